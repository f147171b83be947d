"""A unit's tokens on a GPU, and beside it where they pass the room there: the same bytes."""

from dataclasses import replace

import pytest
import torch

from p48ray.unit import routed_tokens
from p48ray.unit.compress import compress_unit
from p48ray.unit.context import StageContext
from tests.unit.conftest import PAIR, Opener, shard_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SETTINGS = (
    "compression.output_curvature=true",
    "calibration.stored_bits=8",
    "compression.refine_steps=3",
)
ROOMS = {"all": 10**9, "some": 60_000, "none": 0}


def test_unit_whose_tokens_pass_the_room_on_a_gpu_makes_the_same_bytes(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, places = set(), {}
    for name, room in ROOMS.items():
        context: StageContext = replace(opened(*SETTINGS), device=torch.device("cuda"))
        monkeypatch.setattr(routed_tokens, "token_room_bytes", lambda *_, room=room: room)
        tokens = routed_tokens.RoutedTokens(context, PAIR, context.layer_scales(PAIR.layer))
        assert tokens.gathered is not None
        columns = [s.x.values_TH for s in tokens.gathered]
        places[name] = {
            kind: sum(t.nbytes for t in columns if t.device.type == kind)
            for kind in ("cuda", "cpu")
        }
        shards.add(shard_bytes(context, compress_unit(context, PAIR)))
    assert len(shards) == 1
    whole = places["all"]["cuda"]
    assert places["all"]["cpu"] == 0 and places["some"]["cuda"] > 0 < places["some"]["cpu"]
    assert places["none"]["cpu"] > 0.9 * whole, "what is left of the room's last bytes is little"

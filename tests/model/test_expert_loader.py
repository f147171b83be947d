"""What of an expert loader needs no GPU: where tensors lie in a slot."""

import torch

from p48ray.model.expert_loader import GPU_ALIGNMENT, lay_out


def test_places_are_aligned_and_do_not_overlap() -> None:
    tensors = {
        name: torch.empty(size, dtype=torch.uint8)
        for name, size in {"a": 1, "b": 256, "c": 257, "d": 0, "e": 5}.items()
    }
    places, size = lay_out(tensors)
    assert list(places.values()) == [0, 256, 512, 1024, 1024] and size == 1280
    assert all(place % GPU_ALIGNMENT == 0 for place in places.values())

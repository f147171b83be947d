"""Names of linears and the quantization config that p48ray writes for them, as JSON for the
clients' environment: small checkpoints of every family, and Kimi-K2.5's true shapes.

python -m tests.clients.names FILE
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from p48ray.checkpoint.families import describe_model
from p48ray.checkpoint.index import CONFIG_KEY, open_checkpoint
from p48ray.checkpoint.layout import PROJECTIONS
from p48ray.checkpoint.modelopt_config import modelopt_files
from p48ray.checkpoint.output_config import output_config
from p48ray.checkpoint.skeleton import write_kimi_k25_skeleton
from p48ray.store import LocalStore
from tests.checkpoint.test_ignore import other_names, plain_linears
from tests.checkpoint.tiny_variants import write_folder
from tests.reference import tiny_families


def described(folder: Path) -> dict[str, Any]:
    """A source's config as written, and the names of its linears as servers may have them."""
    index = open_checkpoint(LocalStore(folder))
    layout = describe_model(index)
    experts = {
        layout.expert_linear_name(layer, expert, projection)
        for layer in layout.moe_layers
        for expert in range(layout.num_experts)
        for projection in PROJECTIONS
    }
    config = output_config(index, layout)
    return {
        "config": config[CONFIG_KEY],
        "modelopt": modelopt_files(config, experts)[0][CONFIG_KEY],
        "plain": sorted(n for name in plain_linears(index, layout) for n in other_names(name)),
        "experts": sorted(experts),
    }


def main(target: Path) -> None:
    found = {}
    with TemporaryDirectory() as folder:
        for family in tiny_families.NAMES:
            write_folder(Path(folder) / family, *getattr(tiny_families, family)())
            found[family] = described(Path(folder) / family)
        write_kimi_k25_skeleton(Path(folder) / "kimi")
        found["kimi's true shapes"] = described(Path(folder) / "kimi")
    target.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

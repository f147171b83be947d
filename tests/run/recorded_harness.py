"""What lm-evaluation-harness 0.4.13 wrote, as far as it is read: a multiple-choice task against the
small model in vLLM, and a group against its dummy."""

from typing import Any

SINGLE: dict[str, Any] = {
    "results": {
        "endings": {
            "name": "endings",
            "alias": "endings",
            "sample_len": 24,
            "acc,none": 0.5416666666666666,
            "acc_stderr,none": 0.10389457216622949,
            "acc_norm,none": 0.7083333333333334,
            "acc_norm_stderr,none": 0.09477598811252413,
        }
    },
    "group_subtasks": {},
    "versions": {"endings": 3.0},
    "n-shot": {"endings": 1},
    "n-samples": {"endings": {"original": 24, "effective": 24}},
    "lm_eval_version": "0.4.13",
}
GROUP: dict[str, Any] = {
    "results": {
        "endings": {
            "name": "endings",
            "sample_len": 24,
            "acc,none": 0.25,
            "acc_stderr,none": 0.09028938981432691,
        },
        "second": {
            "name": "second",
            "sample_len": 8,
            "acc,none": 0.375,
            "acc_stderr,none": 0.18298126367784995,
        },
        "group": {
            "name": "group",
            "sample_len": 32,
            "acc,none": 0.28125,
            "acc_stderr,none": 0.08149003006503311,
            "sample_count": {"acc,none": 32},
        },
    },
    "group_subtasks": {"group": ["endings", "second"]},
    "versions": {"endings": 3.0, "group": "2", "second": 3.0},
    "n-shot": {"endings": 1, "group": 1, "second": 1},
    "n-samples": {
        "endings": {"original": 24, "effective": 24},
        "second": {"original": 8, "effective": 8},
    },
    "lm_eval_version": "0.4.13",
}

"""The numbers of arXiv 2410.11020 (tables 1 to 3), as data. None of them was measured here.

All are percent, from the test servers of GLUE and SuperGLUE, one sampled answer a row at T=1; the
language model is Llama-2-7B-chat unless a table says otherwise. The BERT rows are those the paper
cites. A tuple has the metrics of `TaskSpec.shown`, in its order: F1 for QQP and MRPC,
Spearman for STS-B, Matthews for CoLA and AX, F1 and accuracy for CB, and so on.
"""

from __future__ import annotations

SOURCE = "published (arXiv 2410.11020, Llama-2-7B, test server)"
COST_RATIO = 1.32  # time of PPO over that of SFT, as the paper states it

Numbers = tuple[float, ...]

_GLUE_COLUMNS = (  # as the paper prints them
    "mnli", "mnli-mm", "qqp", "qnli", "sst2", "cola", "stsb", "mrpc", "glue/rte", "wnli", "ax",
)  # fmt: skip
_GLUE: dict[str, tuple[float | None, ...]] = {  # the last number is the paper's average
    "BERT-base": (84.6, 83.4, 71.2, 90.5, 93.5, 52.1, 85.8, 88.9, 66.4, None, None, 79.6),
    "BERT-large": (86.7, 85.9, 72.1, 92.7, 94.9, 60.5, 86.5, 89.3, 70.1, None, None, 82.1),
    "zero-shot": (38.3, 39.7, 31.3, 58.5, 75.7, 18.6, 27.5, 66.3, 59.3, 44.5, 9.2, 46.1),
    "few-shot": (62.4, 61.7, 30.9, 60.7, 84.2, 29.0, 45.5, 80.8, 72.9, 51.4, 9.2, 58.7),
    "sft-st": (87.0, 86.5, 63.8, 93.6, 73.8, 50.7, 84.7, 85.8, 80.4, 63.7, 45.1, 78.5),
    "ppo-st": (88.8, 88.2, 70.5, 93.2, 96.4, 59.9, 92.6, 89.4, 84.3, 74.7, 52.7, 84.8),
    "sft-mt": (84.9, 84.5, 62.9, 86.0, 72.0, 41.4, 85.5, 82.6, 86.2, 76.0, 41.2, 76.2),
    "ppo-mt": (88.7, 88.3, 67.3, 90.2, 94.6, 47.7, 94.7, 86.7, 86.9, 66.4, 43.4, 82.9),
}

_SUPERGLUE_COLUMNS = (
    "boolq", "cb", "copa", "multirc", "record", "superglue/rte", "wic", "wsc", "ax-b", "ax-g",
)  # fmt: skip
_SUPERGLUE: dict[str, tuple[float | Numbers, ...]] = {
    "BERT-large": (
        77.4, (75.7, 83.6), 70.6, (70.0, 24.0), (72.0, 71.3), 71.6, 69.5, 64.3, 23.0, (97.8, 51.7),
        69.0,
    ),
    "BERT-large++": (
        79.0, (84.7, 90.4), 73.8, (70.0, 24.1), (72.0, 71.3), 79.0, 69.5, 64.3, 38.0, (99.4, 51.4),
        71.5,
    ),
    "zero-shot": (
        75.8, (26.4, 43.6), 57.0, (51.9, 20.3), (27.0, 26.2), 59.2, 54.4, 52.1, 9.1, (64.0, 55.1),
        49.5,
    ),
    "few-shot": (
        80.2, (33.4, 50.4), 47.6, (37.2, 12.6), (38.1, 37.1), 72.9, 51.1, 47.9, 9.1, (64.0, 55.1),
        49.8,
    ),
    "ppo-st": (
        85.9, (74.7, 88.0), 88.6, (82.5, 50.0), (70.6, 69.9), 84.3, 72.1, 78.1, 52.7, (91.0, 79.8),
        78.3,
    ),
}  # fmt: skip

BACKBONE_COLUMNS = ("BERT-large", "Llama-2-7B", "Qwen2.5-7B", "MPT-7B")
BACKBONES: dict[str, dict[str, tuple[float, float]]] = {  # method: model: STS-B, COPA
    "tuned": {"BERT-large": (86.5, 70.6)},
    "zero-shot": {"Llama-2-7B": (27.5, 57.0), "Qwen2.5-7B": (83.7, 96.6), "MPT-7B": (19.7, 57.4)},
    "few-shot": {"Llama-2-7B": (45.5, 47.6), "Qwen2.5-7B": (87.0, 47.6), "MPT-7B": (21.7, 49.6)},
    "ppo-st": {"Llama-2-7B": (92.6, 88.6), "Qwen2.5-7B": (92.2, 97.0), "MPT-7B": (89.3, 84.0)},
}


def _row(
    columns: tuple[str, ...], values: tuple[float | Numbers | None, ...]
) -> dict[str, Numbers]:
    pairs = zip((*columns, "average"), values, strict=True)
    return {k: v if isinstance(v, tuple) else (v,) for k, v in pairs if v is not None}


# method: {task or "average": numbers}; what the paper leaves blank is absent.
TABLES: dict[str, dict[str, dict[str, Numbers]]] = {
    "glue": {method: _row(_GLUE_COLUMNS, values) for method, values in _GLUE.items()},
    "superglue": {
        method: _row(_SUPERGLUE_COLUMNS, values) for method, values in _SUPERGLUE.items()
    },
}

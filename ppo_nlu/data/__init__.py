"""Where a task's rows come from, which of them are used, and in which order training sees them.

Strings and numbers only, no tensors. Nothing here prints: the place that was taken and what was
left out are in the notes that come back, and the programs print those. The official formats are in
`readers`, the user's own files in `userfiles`, how archives are fetched in `download`.

Look at the data, or fetch it:  python -m ppo_nlu.data check|get [TASK...]
"""

from ppo_nlu.data.seen_labels import SEEN_LABELS, exclusions, saw_labels
from ppo_nlu.data.sources import Source, cache_root, expand, local, locate, task_folder
from ppo_nlu.data.splits import Dataset, has_split, load_split
from ppo_nlu.data.texts import about_too_long, few_rows, joined, normalise, oddities, one_label
from ppo_nlu.data.training import batch_indices, epoch_order, first, train_examples
from ppo_nlu.data.userfiles import input_columns, read_inputs

__all__ = [
    "SEEN_LABELS",
    "Dataset",
    "Source",
    "about_too_long",
    "batch_indices",
    "cache_root",
    "epoch_order",
    "exclusions",
    "expand",
    "few_rows",
    "first",
    "has_split",
    "input_columns",
    "joined",
    "load_split",
    "local",
    "locate",
    "normalise",
    "oddities",
    "one_label",
    "read_inputs",
    "saw_labels",
    "task_folder",
    "train_examples",
]

"""Checkpoints that are there whole or not at all.

    folder/checkpoint_step_120.pt           tensors and plain values; loads with weights_only=True
    folder/checkpoint_step_120.pt.sha256    its digest, in `sha256sum`'s format
    folder/checkpoint_step_120/             of a sharded run: a folder, with the digests in manifest.sha256
    folder/checkpoint_latest.pt             a link to the newest (checkpoint_latest, of folders)

`single.py` writes and reads one file, `sharded.py` a folder to which all ranks write, `manifest.py` says whether a
checkpoint is what was written, `screening.py` what a file of unknown origin would do, `folder.py` what lies side by
side.
"""

from orbit.core.checkpoint.errors import CheckpointError
from orbit.core.checkpoint.folder import (
    checkpoint_path,
    latest_checkpoint,
    link_latest,
    list_checkpoints,
    prune,
    step_of,
    sweep,
)
from orbit.core.checkpoint.manifest import MANIFEST, is_valid, write_folder_manifest
from orbit.core.checkpoint.screening import screen
from orbit.core.checkpoint.sharded import load_sharded, new_group, save_and_tidy, save_sharded
from orbit.core.checkpoint.single import load_checkpoint, save_checkpoint

__all__ = [
    "MANIFEST",
    "CheckpointError",
    "checkpoint_path",
    "is_valid",
    "latest_checkpoint",
    "link_latest",
    "list_checkpoints",
    "load_checkpoint",
    "load_sharded",
    "new_group",
    "prune",
    "save_and_tidy",
    "save_checkpoint",
    "save_sharded",
    "screen",
    "step_of",
    "sweep",
    "write_folder_manifest",
]

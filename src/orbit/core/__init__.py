"""The training core: one loop, its events, and what must be true around every step."""

from orbit.core.blocks import BlocksError, find_blocks
from orbit.core.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from orbit.core.events import EVENTS, BaseHook, Plugin
from orbit.core.feeding.feed import Feed, FeedError
from orbit.core.feeding.workers import WorkerError
from orbit.core.loop import Core
from orbit.core.measuring.lr_find import LRFind
from orbit.core.meters import Averages
from orbit.core.nested import key_average, map_nested_tensor
from orbit.core.options import RunOptions
from orbit.core.outcome import Outcome
from orbit.core.rng import seed_everything, seed_worker
from orbit.core.runtime import resolve_device, unwrap
from orbit.core.second_pass import SecondPassError
from orbit.core.state import TrainState
from orbit.core.update import NonFiniteGradientError, Updater

__all__ = [
    "EVENTS",
    "Averages",
    "BaseHook",
    "BlocksError",
    "CheckpointError",
    "Core",
    "Feed",
    "FeedError",
    "LRFind",
    "NonFiniteGradientError",
    "Outcome",
    "Plugin",
    "RunOptions",
    "SecondPassError",
    "TrainState",
    "Updater",
    "WorkerError",
    "find_blocks",
    "key_average",
    "latest_checkpoint",
    "load_checkpoint",
    "map_nested_tensor",
    "resolve_device",
    "save_checkpoint",
    "seed_everything",
    "seed_worker",
    "unwrap",
]

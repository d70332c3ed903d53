"""What the building blocks refuse, and why. Every error names the value, the rule and the way out."""


class SettingError(ValueError):
    """A block cannot be built with these arguments."""


class ShapeError(ValueError):
    """An input has another shape or dtype than the block takes."""


class MaskError(ShapeError):
    """A mask is not boolean, or does not fit queries and keys."""


class CacheError(ValueError):
    """A cache does not belong to this layer or batch."""


class TargetError(ValueError):
    """A name or pattern matches nothing in the model."""


class WeightsError(ValueError):
    """Weights are damaged, do not belong to the model, or cannot be written."""

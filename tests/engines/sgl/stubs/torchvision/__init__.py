"""In place of torchvision, of which there is no build for the CPU beside this torch: the few names that are imported.

SGLang's configurations of models with pictures, and transformers, name them when they are imported; with a model of
text nobody calls them.
"""

__version__ = "0.28.0"


def placeholder(name: str) -> type:
    """A class of that name that can do nothing: the `__getattr__` of modules that hold nothing else."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})

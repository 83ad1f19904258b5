"""Everything that is imported from torchvision.io."""

from torchvision import placeholder


def __getattr__(name: str) -> type:
    return placeholder(name)

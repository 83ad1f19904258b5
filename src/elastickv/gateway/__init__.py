"""One address for many models: their engines are started, watched, put to sleep and woken, and requests find them."""

__all__ = ()

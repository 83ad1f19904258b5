"""Which request goes next. Pure functions: no clock, no input or output, no engine."""

__all__ = ()

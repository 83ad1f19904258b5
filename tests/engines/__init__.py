"""Tests that run whole engines."""

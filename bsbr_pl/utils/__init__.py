"""Instruments, usable without Lightning."""

"""Cascade: cascaded text-to-video diffusion that can be trained, distilled, evaluated and trusted."""

__version__ = "0.1.0"

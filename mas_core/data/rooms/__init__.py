"""Procedural rooms: the embedded data, written in Taskonomy's own layout and encodings."""

from .labels import DOMAINS, encode, render_view
from .render import RENDERER_VERSION, render_rooms
from .scene import make_building, make_cameras

__all__ = [
    "DOMAINS",
    "RENDERER_VERSION",
    "encode",
    "make_building",
    "make_cameras",
    "render_rooms",
    "render_view",
]

"""Images on the host: from a file to patches, from a prompt to tokens with room for them.

Knows the rules of preprocessing and of spans; neither the vision tower nor how a step is executed.
"""

from .load import ImagePatches, load_patches
from .prompt import MARKER, encode_with_images, split_prompt
from .rules import ImagePlan, ImageRules, plan
from .span import END, IMAGE, NEWLINE, START, TEXT, Expanded, expand

__all__ = [
    "END",
    "IMAGE",
    "MARKER",
    "NEWLINE",
    "START",
    "TEXT",
    "Expanded",
    "ImagePatches",
    "ImagePlan",
    "ImageRules",
    "encode_with_images",
    "expand",
    "load_patches",
    "plan",
    "split_prompt",
]

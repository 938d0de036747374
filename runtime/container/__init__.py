"""The artifact file `m.dsv4`: how it is laid out (`layout`), written (`writer`) and opened (`reader`).

It must not know what a section or a tensor means; that is the business of who asks for it.

    offset 0         header, 64 bytes: magic, format version, CRC-32 of the header,
                     offset, length and SHA-256 of the manifest
    4096, 8192, ...  sections, each on a page of its own, so that code can be mapped by itself
    multiples of 64  tensors, one after the other (aligned for every SIMD width in use)
    the end          manifest: JSON with name, span and SHA-256 of every section and tensor

All numbers are little-endian. Padding is zero. The manifest comes last because the sizes and
checksums of streamed tensors are known only then; the header, written after it, makes it valid.
"""

from dsv4c.runtime.container.amend import amend_meta
from dsv4c.runtime.container.layout import STORAGE, SectionEntry, TensorEntry
from dsv4c.runtime.container.reader import Artifact
from dsv4c.runtime.container.writer import ArtifactWriter

__all__ = ["STORAGE", "Artifact", "ArtifactWriter", "SectionEntry", "TensorEntry", "amend_meta"]

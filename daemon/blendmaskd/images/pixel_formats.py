"""Pixel formats: what an encoded image says its pixels are, and which of these are read.

Pillow's mode is not trusted for it. For some formats that a header can declare, Pillow 13 gives other pixels without a
word: TIFFs whose planes lie apart in 16 bits come out garbled, those where 0 is white negative, 12 bits nearly black,
signed ones as unsigned. So what is read is listed here, and everything else is refused by its name;
`tests/daemon/test_pixel_formats.py` holds the list against the pixels, and what is not on it against silence.

How deeper and shallower samples become 8 bits, and what becomes of transparency, is said in docs/client.md. Must never
decode a pixel.
"""
from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import TiffImagePlugin
from PIL.ImageFile import ImageFile

from blendmaskd.images import bombs

# libtiff reads every TIFF: Pillow's own reader of uncompressed ones garbles planes of 16 bits, and of reversed bits.
TiffImagePlugin.READ_LIBTIFF = True
# Formats that Pillow unpacks, but not in both byte orders or with white as 0. Their depth is brought to 8 bits by us.
TiffImagePlugin.OPEN_INFO.update(
    {
        (order, photometric, (1,), 1, (bits,), ()): ("I;16", f"I;{bits}")
        for order in (b"II", b"MM")
        for photometric in (0, 1)
        for bits in (12, 16)
    }
)

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_PHOTOMETRICS = {
    _WHITE_IS_ZERO: "WhiteIsZero", _BLACK_IS_ZERO: "BlackIsZero", _RGB: "RGB", _PALETTE: "palette", 4: "mask",
    _CMYK: "CMYK", _YCBCR: "YCbCr", 8: "CIELab", 9: "ICCLab", 10: "ITULab", 32803: "CFA", 32844: "LogL",
    32845: "LogLuv", 34892: "LinearRaw",
}  # fmt: skip
_SAMPLES = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3}  # without extra ones
_KINDS = {1: "integer", 2: "signed integer", 3: "float", 4: "undefined", 5: "complex integer", 6: "complex float"}
_EXTRAS = {0: "unspecified", 1: "associated alpha", 2: "alpha"}

_NONE, _FAXES, _LZW, _JPEG, _PACKBITS, _LZMA, _ZSTD = 1, (2, 3, 4), 5, 7, 32773, 34925, 50000
_DEFLATES = (8, 32946)
_PLAIN = (_NONE, _LZW, *_DEFLATES, _PACKBITS, _LZMA, _ZSTD)  # whatever the samples are
_PREDICTED = (_LZW, *_DEFLATES, _LZMA, _ZSTD)
_COMPRESSIONS = {
    _NONE: "not compressed", 2: "CCITT RLE", 3: "CCITT fax 3", 4: "CCITT fax 4", _LZW: "LZW", 6: "old-style JPEG",
    _JPEG: "JPEG", 8: "deflate", 32946: "deflate", _PACKBITS: "PackBits", _LZMA: "LZMA", _ZSTD: "zstd", 50001: "WebP",
    34676: "SGI log", 34677: "SGI log 24", 32771: "16-bit padding", 32809: "ThunderScan", 34712: "JPEG 2000",
    34887: "LERC", 50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip

# (photometric, bits, planes apart) to the extra samples that are read.
_ANY_EXTRA: tuple[tuple[int, ...], ...] = ((), (0,), (2,))
_READ: dict[tuple[int, int, bool], tuple[tuple[int, ...], ...]] = {
    **{(photometric, bits, False): ((),) for photometric in (0, 1) for bits in (1, 2, 4, 8, 12, 16)},
    **{(_PALETTE, bits, False): ((),) for bits in (1, 2, 4, 8)},
    (_BLACK_IS_ZERO, 8, False): _ANY_EXTRA,
    (_PALETTE, 8, False): _ANY_EXTRA,
    (_RGB, 8, False): (*_ANY_EXTRA, (1,), (0, 0), (0, 0, 0), (1, 0), (1, 0, 0), (2, 0), (2, 0, 0)),
    (_RGB, 16, False): (*_ANY_EXTRA, (1,)),
    (_RGB, 8, True): _ANY_EXTRA,
    (_RGB, 16, True): _ANY_EXTRA,
    (_CMYK, 8, False): ((), (0,), (0, 0)),
    (_CMYK, 16, False): ((),),
    (_CMYK, 8, True): ((),),
    (_CMYK, 16, True): ((),),
    (_YCBCR, 8, False): ((),),
}

# Entries that say what the pixels are. Each must be there once, of these types, as both Pillow and libtiff read it.
_BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES_PER_PIXEL = 258, 259, 262, 266, 277
_PLANAR, _PREDICTOR, _COLOURS, _EXTRA, _SAMPLE_FORMAT, _SUBSAMPLING = 284, 317, 320, 338, 339, 530
_SINGLE = (256, 257, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES_PER_PIXEL, _PLANAR, _PREDICTOR)
_LISTS = (_BITS, _COLOURS, _EXTRA, _SAMPLE_FORMAT, _SUBSAMPLING)
_NUMBERS = {3: 2, 4: 4}  # SHORT and LONG, and their bytes
# Entries that would change what the pixels mean, and what they say when they do not.
_WITHOUT_EFFECT: dict[int, tuple[str, tuple[object, ...]]] = {
    254: ("reduced or a mask (NewSubfileType)", (0, 2)),
    332: ("of other inks (InkSet)", (1,)),
    334: ("of other inks (NumberOfInks)", (4,)),
    336: ("of reduced ink (DotRange)", ((0, 255), (0, 65535))),
    346: ("indexed", (0,)),
    32995: ("matted", ()),
    32996: ("of an old data type", ()),
    32997: ("a volume (ImageDepth)", (1,)),
    32998: ("a volume (TileDepth)", (1,)),
}


class UnreadFormat(ValueError):
    """Pixels that are not read; the text names their format and says what to do."""

    def __init__(self, file: str, name: str) -> None:
        super().__init__(f"this {file}'s pixel format is not read: {name}; convert it, for example to 8-bit RGB")


@dataclass(frozen=True, slots=True)
class Depth:
    """How samples that Pillow gives in 16 bits become 8."""

    bits: int = 16
    white_is_zero: bool = False


def check(encoded: bytes) -> Depth:
    """What is needed to know of its pixels beside Pillow's mode, if it is an image of a known format.

    Raises `UnreadFormat`, ValueError for a TIFF whose directory its readers may read differently, and whatever damaged
    headers run into.
    """
    if encoded.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"MM*\0", b"II\0*")):
        return _check_tiff(encoded)
    if encoded.startswith(b"\xff\xd8\xff"):
        _check_jpeg(encoded)
    elif encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(encoded)
    elif encoded.startswith(b"BM"):
        _check_bmp(encoded)
    return Depth()


def check_opened(image: ImageFile, encoded: bytes) -> None:
    """What only Pillow's reading of the whole header tells. Raises `UnreadFormat`."""
    if image.format in ("JPEG", "MPO") and image.mode == "CMYK" and "adobe" not in image.info:
        raise UnreadFormat("JPEG", "CMYK that does not say whether 0 is ink (no Adobe segment)")
    if image.format == "PNG" and image.mode == "P" and image.palette is None:
        raise UnreadFormat("PNG", "palette colours without a palette")
    if image.format == "BMP":
        bits = struct.unpack_from("<H", encoded, 24 if encoded[14] == 12 else 28)[0]
        if image.tile[0].codec_name == "raw" and {"1": 1, "L": 8}.get(image.mode, bits) != bits:
            raise UnreadFormat("BMP", f"{bits} bits with a palette of few greys")


# -- TIFF -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TiffFormat:
    """What the directory of a TIFF says of its pixels; numbers as in TIFF 6.0."""

    photometric: int
    bits: tuple[int, ...]  # of each sample of a pixel
    kinds: tuple[int, ...]  # SampleFormat, of each
    extra: tuple[int, ...]  # ExtraSamples
    planar: int
    compression: int
    predictor: int
    fill_order: int
    subsampling: tuple[int, ...]  # of YCbCr's chrominance, across and down

    @property
    def read(self) -> bool:
        """Whether its pixels come out right."""
        return (
            set(self.kinds) == {1}
            and len(set(self.bits)) == 1
            and self.fill_order in (1, 2)
            and self.planar in (1, 2)
            and self._counted
            and self.extra in _READ.get((self.photometric, self.bits[0], self._apart), ())
            and self._decompressed
            and (self.fill_order == 1 or self._reversible)
        )

    @property
    def _counted(self) -> bool:
        """Whether its samples are as many as it declares; a fourth one of RGB is alpha, as everybody takes it."""
        undeclared = self.photometric == _RGB and len(self.bits) == 4 and not self.extra and not self._apart
        return undeclared or len(self.bits) == _SAMPLES.get(self.photometric, 0) + len(self.extra)

    @property
    def _apart(self) -> bool:
        return self.planar == 2 and len(self.bits) > 1

    @property
    def _reversible(self) -> bool:
        """Whether Pillow knows it with its bits in reversed order."""
        return not self.extra and self.bits[0] <= 8 and self.photometric <= _PALETTE and self.compression != _JPEG

    @property
    def _decompressed(self) -> bool:
        """Whether its compression goes with the rest."""
        if self.compression == _JPEG:
            whole = not self.extra and not self._apart and self.bits in ((8,), (8, 8, 8)) and self.predictor == 1
            return whole and self.photometric in (_BLACK_IS_ZERO, _RGB, _YCBCR)
        if self.compression in _FAXES:
            return self.photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO) and self.bits == (1,) and self.predictor == 1
        if self.photometric == _YCBCR and self.subsampling != (1, 1):
            return False
        if self.predictor == 2:
            return self.compression in _PREDICTED and self.bits[0] in (8, 16)
        return self.compression in _PLAIN and self.predictor == 1

    def __str__(self) -> str:
        alike = len(set(self.bits)) == 1 and len(set(self.kinds)) == 1
        each = [f"{bits}-bit {_KINDS.get(kind, f'of kind {kind}')}" for bits, kind in zip(self.bits, self.kinds)]
        parts = [f"{len(self.bits)} x {each[0]}" if alike else " + ".join(each)]
        parts.append(_PHOTOMETRICS.get(self.photometric, f"photometric {self.photometric}"))
        parts += [f"extra samples {', '.join(_EXTRAS.get(one, str(one)) for one in self.extra)}"] * bool(self.extra)
        parts += ["planes apart"] * (self.planar == 2) + [f"planar {self.planar}"] * (self.planar not in (1, 2))
        parts.append(_COMPRESSIONS.get(self.compression, f"compression {self.compression}"))
        if self.photometric == _YCBCR:
            parts.append(f"chrominance {' x '.join(map(str, self.subsampling))}")
        parts += [f"predictor {self.predictor}"] * (self.predictor != 1)
        parts += [f"fill order {self.fill_order}"] * (self.fill_order != 1)
        return ", ".join(parts)


def _check_tiff(encoded: bytes) -> Depth:
    if encoded.startswith(b"MM\0+"):  # Pillow takes it for no BigTIFF
        raise UnreadFormat("TIFF", "BigTIFF in big-endian order")
    try:
        directory = bombs.directory(encoded)
    except (SyntaxError, struct.error):
        return Depth()  # not even a header, which Pillow will say
    _refuse_ambiguous(directory, bombs.tags(encoded, directory))
    for tag, (name, harmless) in _WITHOUT_EFFECT.items():
        if tag in directory and directory[tag] not in harmless:
            raise UnreadFormat("TIFF", name)
    if _PHOTOMETRIC not in directory:
        raise UnreadFormat("TIFF", "not said (no PhotometricInterpretation)")
    found = _tiff_format(directory)
    if not found.read:
        raise UnreadFormat("TIFF", str(found))
    if found.photometric == _PALETTE:
        _check_colours(_numbers(directory, _COLOURS), found.bits[0])
    return Depth(found.bits[0], found.photometric == _WHITE_IS_ZERO)


def _refuse_ambiguous(directory: TiffImagePlugin.ImageFileDirectory_v2, written: Sequence[int]) -> None:
    """Pillow takes the first of two entries, any type and the first of many values; libtiff does not always."""
    for tag in (*_SINGLE, *_LISTS):
        if written.count(tag) > 1:
            raise ValueError(f"its entry {tag} is there more than once")
        if tag not in written:
            continue
        if tag not in directory or directory.tagtype[tag] not in _NUMBERS:
            raise ValueError(f"its entry {tag} is damaged, or of a type that it must not have")
        if tag in _SINGLE and len(directory._tagdata[tag]) != _NUMBERS[directory.tagtype[tag]]:
            raise ValueError(f"its entry {tag} has more than one value")


def _tiff_format(directory: TiffImagePlugin.ImageFileDirectory_v2) -> TiffFormat:
    count = directory.get(_SAMPLES_PER_PIXEL, 1)
    if not 1 <= count <= TiffImagePlugin.MAX_SAMPLESPERPIXEL:
        raise UnreadFormat("TIFF", f"{count} samples")
    return TiffFormat(
        directory[_PHOTOMETRIC],
        _for_each(_numbers(directory, _BITS) or (1,), count, "BitsPerSample"),
        _for_each(_numbers(directory, _SAMPLE_FORMAT) or (1,), count, "SampleFormat"),
        _numbers(directory, _EXTRA),
        directory.get(_PLANAR, 1),
        directory.get(_COMPRESSION, 1),
        directory.get(_PREDICTOR, 1),
        directory.get(_FILL_ORDER, 1),
        _numbers(directory, _SUBSAMPLING) or (2, 2),
    )


def _numbers(directory: TiffImagePlugin.ImageFileDirectory_v2, tag: int) -> tuple[int, ...]:
    found = directory.get(tag, ())
    return found if isinstance(found, tuple) else (found,)


def _for_each(values: tuple[int, ...], count: int, name: str) -> tuple[int, ...]:
    """One value stands for all samples, as many writers mean it."""
    if len(values) == 1:
        return values * count
    if len(values) != count:
        raise UnreadFormat("TIFF", f"{name} of {len(values)} samples, where a pixel has {count}")
    return values


def _check_colours(colours: tuple[int, ...], bits: int) -> None:
    if len(colours) != 3 << bits:
        raise UnreadFormat("TIFF", f"a palette of {len(colours)} numbers for {bits} bits")
    if 0 < max(colours) < 256:  # some writers' mistake, which would come out black
        raise UnreadFormat("TIFF", "a palette of 8-bit colours")


# -- JPEG, PNG, BMP ---------------------------------------------------------------------------------------------------

_FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}  # sequential and progressive, Huffman or arithmetic
_OTHER_FRAMES = {0xC3: "lossless", 0xCB: "lossless, arithmetic", 0xF7: "JPEG-LS"} | dict.fromkeys(
    (0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical"
)
_MOST_STEPS = 10_000  # to the frame; who has more is not told its format


def _check_jpeg(encoded: bytes) -> None:
    place = 2
    for _ in range(_MOST_STEPS):
        if encoded[place : place + 1] != b"\xff" or place + 10 > len(encoded):
            return
        marker, length = encoded[place + 1], int.from_bytes(encoded[place + 2 : place + 4])
        if marker in _OTHER_FRAMES:
            raise UnreadFormat("JPEG", _OTHER_FRAMES[marker])
        if marker in _FRAMES:
            bits, components = encoded[place + 4], encoded[place + 9]
            if bits != 8 or components not in (1, 3, 4):
                raise UnreadFormat("JPEG", f"{components} x {bits}-bit")
            return
        place += 1 if marker == 0xFF else 2 + length  # before a marker, as many of these as one likes


_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type, as PNG has them


def _check_png(encoded: bytes) -> None:
    if encoded[12:16] == b"CgBI":
        raise UnreadFormat("PNG", "Apple's for iOS (CgBI)")
    if encoded[12:16] == b"IHDR" and len(encoded) > 25 and encoded[24] not in _DEPTHS.get(encoded[25], ()):
        raise UnreadFormat("PNG", f"colour type {encoded[25]} of {encoded[24]} bits, which PNG does not have")


_PALETTES = {(1, 0), (4, 0), (8, 0), (8, 1), (4, 2)}  # bits, compression
_COLOURED = {(16, 0), (24, 0), (32, 0)}
_MASKS: dict[int, set[tuple[int, ...]]] = {  # of red, green and blue, for 32 bits also of alpha
    16: {(0xF800, 0x7E0, 0x1F), (0x7C00, 0x3E0, 0x1F)},
    32: {
        (0xFF0000, 0xFF00, 0xFF, 0),
        (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
        (0xFF000000, 0xFF0000, 0xFF00, 0),
        (0xFF000000, 0xFF0000, 0xFF00, 0xFF),
        (0xFF000000, 0xFF00, 0xFF, 0),
        (0xFF000000, 0xFF00, 0xFF, 0xFF0000),
        (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
    },
}


def _check_bmp(encoded: bytes) -> None:
    if len(encoded) < 54:
        return
    [size] = struct.unpack_from("<I", encoded, 14)
    bits, compression = struct.unpack_from("<HI", encoded, 28)
    if size == 12:
        bits, compression = struct.unpack_from("<H", encoded, 24)[0], 0
    if (bits, compression) in _PALETTES | _COLOURED:
        return
    name = f"{bits} bits, compression {compression}"
    if compression == 3 and bits in _MASKS and size != 64 and len(encoded) >= 70:  # 64: OS/2, where 3 is a fax
        *colours, alpha = struct.unpack_from("<IIII", encoded, 54)
        masks = (*colours, alpha if size >= 56 else 0)[: 3 if bits == 16 else 4]
        if masks in _MASKS[bits]:
            return
        name = f"{bits} bits in masks " + " ".join(f"{mask:x}" for mask in masks)
    raise UnreadFormat("BMP", name)

"""Image files of every kind that people have or that damage makes, with the right verdict on each.

A verdict is a word of WORDS or, for a file that has to be refused, a part of the reason:

    same       a JPEG that is stored unchanged
    converted  stored as a JPEG made from its pixels
    damaged    stored unchanged; libjpeg's warning goes into the report
    undecodable  only decoding shows the fault: adopting accepts it, all else refuses it
"""

from __future__ import annotations

import struct
import zlib
from functools import cache

import numpy as np
from flat_jpeg import flat_jpeg, lossless_jpeg, segment
from PIL import Image
from shard_samples import encode, picture

WORDS = ("same", "converted", "damaged", "undecodable")
SIZE = (61, 45)
EOI = b"\xff\xd9"


def photo(mode: str = "RGB") -> Image.Image:
    return picture(3, SIZE, mode)


def jpeg(mode: str = "RGB", **options: object) -> bytes:
    return encode(photo(mode), **{"quality": 90, **options})


def deep(kind: str, values: np.ndarray) -> bytes:
    return encode(Image.fromarray(values), kind)


def ramp(top: float, dtype: type) -> np.ndarray:
    """[45, 61] values from 0 to top."""
    return np.linspace(0, top, SIZE[0] * SIZE[1]).reshape(SIZE[::-1]).astype(dtype)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width), np.uint8)


def with_alpha(low: int, mode: str = "RGBA") -> Image.Image:
    """The photo with an alpha channel from `low` to 255."""
    image = photo(mode)
    alpha = low + ramp(255 - low, np.float64)
    image.putalpha(Image.fromarray(alpha.round().astype(np.uint8)))
    return image


def patched(data: bytes, marker: int, offset: int, new: bytes) -> bytes:
    """`data` with bytes replaced at `offset` from the first marker ff`marker`."""
    at = data.index(bytes([0xFF, marker])) + offset
    return data[:at] + new + data[at + len(new) :]


def before_scan(data: bytes, extra: bytes) -> bytes:
    return data[:2] + extra + data[2:]


def chunk(kind: bytes, content: bytes) -> bytes:
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def inserted(png: bytes, new: bytes, before: bytes = b"IDAT") -> bytes:
    at = png.index(before) - 4
    return png[:at] + new + png[at:]


def repeated_scans(count: int) -> bytes:
    """A valid colour JPEG with a scan per component, the first of them `count - 2` times."""
    data = flat_jpeg(16, 16, interleaved=False)
    starts = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    first = data[starts[0] : starts[1]]
    return data[: starts[0]] + first * (count - 2) + data[starts[1] :]


def without_last_scans(data: bytes, count: int = 2) -> bytes:
    for _ in range(count):
        data = data[: data.rindex(b"\xff\xda")]
    return data + EOI


def exif(orientation: int) -> Image.Exif:
    about = Image.Exif()
    about[0x0112] = orientation
    return about


def jpegs() -> dict[str, tuple[bytes, str]]:
    """Sound JPEGs: all of these can be trained from."""
    grey = flat_jpeg(*SIZE, [(1, 1)])
    sampled = {
        "444": [(1, 1)] * 3, "422": [(2, 1), (1, 1), (1, 1)], "420": [(2, 2), (1, 1), (1, 1)],
        "440": [(1, 2), (1, 1), (1, 1)], "411": [(4, 1), (1, 1), (1, 1)],
        "441": [(1, 4), (1, 1), (1, 1)], "410": [(4, 2), (1, 1), (1, 1)],
        "442": [(2, 4), (1, 1), (1, 1)], "chroma finer": [(1, 1), (2, 2), (2, 2)],
        "422 twice": [(2, 2), (1, 2), (1, 2)], "mixed": [(2, 2), (2, 1), (1, 1)],
        "grey 22": [(2, 2)], "grey 41": [(4, 1)], "grey 14": [(1, 4)], "grey 33": [(3, 3)],
    }  # fmt: skip
    files = {f"sampling {name}": flat_jpeg(*SIZE, s) for name, s in sampled.items()}
    files |= {
        f"scans {name}": flat_jpeg(*SIZE, sampled[name], interleaved=False)
        for name in ("444", "420", "441", "chroma finer")
    }
    whole = jpeg(exif=exif(6))
    files |= {
        "plain": jpeg(), "grey": jpeg("L"), "one pixel": encode(Image.new("RGB", (1, 1))),
        "progressive": jpeg(progressive=True), "restart": jpeg(restart_marker_rows=1),
        "rgb": jpeg(keep_rgb=True), "oriented": whole, "500 scans": repeated_scans(500),
        "extended": flat_jpeg(*SIZE, sof=0xC1),
        "trailing zeros": jpeg() + bytes(9000),
        "trailing film": jpeg() + b"\0\0\0\x18ftypmp42" + np.random.default_rng(1).bytes(50_000),
        "trailing scans": jpeg() + b"\xff\xda" * 600,
        "trailing cut jpeg": jpeg() + jpeg()[:300],
        "mpo": encode(photo(), "MPO", save_all=True, append_images=[photo("L")]) + bytes(5000),
        "fill bytes": before_scan(jpeg(), b"\xff\xff\xff" + segment(0xFE, b"x")),
        "junk between segments": before_scan(jpeg(), b"\0\1\2\xff\0"),
        "short jfif": b"\xff\xd8" + segment(0xE0, b"JFIF\0") + grey[2:],
        "short adobe": before_scan(jpeg(), segment(0xEE, b"Adobe\0")),
        "broken exif": before_scan(jpeg(), segment(0xE1, b"Exif\0\0MM\0*\xff\xff")),
        "broken mpf": before_scan(jpeg(), segment(0xE2, b"MPF\0II*\0\xff\xff")),
        "broken profile": before_scan(jpeg(), segment(0xE2, b"ICC_PROFILE\0")),
        "broken photoshop": before_scan(jpeg(), segment(0xED, b"Photoshop 3.0\x008BIM\4\4\0")),
        "motion jpeg": jpeg().replace(b"\xff\xc4", b"\xff\xfe"),  # the standard's tables
        "comment after scan": flat_jpeg(*SIZE)[:-2] + segment(0xFE, b"x") + EOI,
        "thumbnail": before_scan(jpeg(), segment(0xE1, b"Exif\0\0" + jpeg())),
    }  # fmt: skip
    verdicts = {name: (data, "same") for name, data in files.items()}
    cmyk = jpeg("CMYK")
    verdicts["cmyk"] = (cmyk, "converted")
    verdicts["cmyk of four scans"] = (
        flat_jpeg(*SIZE, [(1, 1)] * 4, interleaved=False),
        "converted",
    )
    return verdicts


def refused_jpegs() -> dict[str, tuple[bytes, str]]:
    data = jpeg()
    names = {
        0xC3: "lossless", 0xC5: "hierarchical", 0xC6: "hierarchical", 0xC7: "hierarchical",
        0xC9: "arithmetic", 0xCA: "arithmetic", 0xCB: "lossless", 0xCD: "hierarchical",
        0xCE: "hierarchical", 0xCF: "hierarchical", 0xF7: "JPEG-LS",
    }  # fmt: skip
    files = {}
    for mode in ("RGB", "L"):
        for marker, reason in names.items():
            made = patched(jpeg(mode), 0xC0, 1, bytes([marker]))
            files[f"{mode} SOF {marker:02x}"] = (made, reason)
    end = data.index(b"\xff\xda") + 30
    table = data.index(b"\xff\xc4") + 5
    too_large = [(4, 4), (1, 1), (1, 1)]
    return files | {
        # simplejpeg dies of this one, so a rule that lets it through ends the tests too.
        "lossless": (lossless_jpeg(noise(400, 600)), "lossless JPEG (SOF3)"),
        "hierarchical": (before_scan(data, segment(0xDE, bytes(15))), "hierarchical"),
        "12 bits": (patched(flat_jpeg(*SIZE, sof=0xC1), 0xC1, 4, b"\x0c"), "12 bits per value"),
        "16 bits": (patched(data, 0xC0, 4, b"\x10"), "16 bits per value"),
        "fractional": (flat_jpeg(*SIZE, [(3, 1), (2, 1), (1, 1)]), "fractional"),
        "fractional down": (flat_jpeg(*SIZE, [(1, 3), (1, 2), (1, 2)]), "fractional"),
        "sampling 0": (patched(data, 0xC0, 11, b"\x01"), "outside 1 to 4"),
        "sampling 5": (patched(data, 0xC0, 11, b"\x51"), "outside 1 to 4"),
        "large blocks": (flat_jpeg(*SIZE, too_large), "too large for one scan"),
        "two channels": (flat_jpeg(*SIZE, [(1, 1)] * 2), "2 channels"),
        "five channels": (flat_jpeg(*SIZE, [(1, 1)] * 5), "5 channels"),
        "no height": (patched(data, 0xC0, 5, b"\0\0"), "no height"),
        "no width": (patched(data, 0xC0, 7, b"\0\0"), "0x45 pixels"),
        "95 Mpixel": (patched(data, 0xC0, 5, struct.pack(">HH", 9500, 10000)), "limit of 89478485"),
        "65501 wide": (patched(data, 0xC0, 5, struct.pack(">HH", 45, 65501)), "limit of 65500"),
        "501 scans": (repeated_scans(501), "more than 500 scans"),
        "two frames": (before_scan(data, segment(0xC0, bytes(15))), "two frames"),
        "two starts": (b"\xff\xd8" + data, "unexpected marker"),
        "no frame": (patched(data, 0xC0, 1, b"\xfe"), "before the frame header"),
        "cut to 90 %": (data[: len(data) * 9 // 10], "truncated"),
        "progressive cut": (jpeg(progressive=True)[:-40], "truncated"),
        "cut in the header": (data[:200], "truncated"),
        "without its end": (data[:-2], "truncated"),
        "cut, with a thumbnail": (before_scan(data[:-300], segment(0xE1, data)), "truncated"),
        "cut, then another": (data[:end] + data, "unexpected marker"),
        "a marker in the scan": (data[:end] + b"\xff\x02" + data[end:], "unexpected marker"),
        "cut, with an end": (data[:end] + EOI, "damaged"),
        "progressive without its end": (
            without_last_scans(jpeg(progressive=True)), "damaged"),
        "only its first scan": (without_last_scans(flat_jpeg(*SIZE, interleaved=False)), "damaged"),
        "bytes before the end": (data[:-2] + b"\x11" * 64 + EOI, "damaged"),
        "broken table": (data[:table] + b"\xff" * 16 + data[table + 16 :], "undecodable"),
    }  # fmt: skip


def pngs() -> dict[str, tuple[bytes, str]]:
    plain = encode(photo(), "PNG")
    used = photo().quantize(16)
    bits = {n: encode(photo("L").quantize(2**n), "PNG", bits=n) for n in (1, 2, 4)}
    frames = [photo("L"), photo("L").rotate(90, expand=False)]
    alpha = "transparent pixels"
    files = {f"palette of {n} bits": (data, "converted") for n, data in bits.items()}
    flipped = bytearray(plain)
    flipped[plain.index(b"IDAT") + 100] ^= 4
    text = inserted(plain, chunk(b"tEXt", b"Title\0x"))
    return files | {
        "rgb": (plain, "converted"), "grey": (encode(photo("L"), "PNG"), "converted"),
        "bilevel": (encode(photo("1"), "PNG"), "converted"),
        "palette": (encode(used, "PNG"), "converted"),
        "palette, transparent": (encode(used, "PNG", transparency=used.getpixel((0, 0))), alpha),
        "palette, half transparent": (encode(used, "PNG", transparency=b"\x80" * 16), alpha),
        "palette, opaque": (encode(used, "PNG", transparency=b"\xff" * 16), "converted"),
        "rgb, transparent colour": (
            encode(photo(), "PNG", transparency=photo().getpixel((0, 0))), alpha),
        "rgba, opaque": (encode(with_alpha(255), "PNG"), "converted"),
        "rgba": (encode(with_alpha(0), "PNG"), alpha),
        "rgba, nearly opaque": (encode(with_alpha(254), "PNG"), alpha),
        "la, opaque": (encode(with_alpha(255, "LA"), "PNG"), "converted"),
        "la": (encode(with_alpha(9, "LA"), "PNG"), alpha),
        "16 bits": (deep("PNG", ramp(65535, np.uint16)), "16 bits per value"),
        "12 of 16 bits": (deep("PNG", ramp(4095, np.uint16)), "16 bits per value"),
        "16 bits, rgb": (deep_rgb_png(), "16 bits per value"),
        "animated": (encode(frames[0], "PNG", save_all=True, append_images=frames[1:]), "2 frames"),
        "a frame beside its picture": (
            inserted(inserted(plain, chunk(b"acTL", b"\0\0\0\1" + bytes(4))),
                     chunk(b"fdAT", bytes(4)), b"IEND"), "2 frames"),
        "bytes after the end": (plain + bytes(9000), "converted"),
        "broken text": (inserted(plain, chunk(b"iCCP", b"x\0\0zzz")), "converted"),
        "oriented at the end": (inserted(plain, chunk(b"eXIf", exif(6).tobytes()[6:]), b"IEND"),
                                "converted"),
        "flipped bit": (bytes(flipped), "checksum of its IDAT chunk"),
        "flipped text": (text.replace(b"Title\0x", b"Title\0y"), "checksum of its tEXt chunk"),
        "no end": (plain[:-12], "no IEND chunk"),
        "cut": (plain[: len(plain) // 2], "in its IDAT chunk"),
        "half the data": (half_png(plain), "undecodable"),
        "a row too few": (black_png((8, 8), False, 9), "undecodable"),
        "without its palette": (
            plain[:8] + chunk(b"IHDR", struct.pack(">II5B", *SIZE, 8, 3, 0, 0, 0)) + plain[33:],
            "without its palette"),
        "colours beyond its palette": (fewer_colours(encode(used, "PNG"), 9), "undecodable"),
        "other first chunk": (plain[:8] + chunk(b"CgBI", bytes(4)) + plain[8:], "begins with"),
        "95 Mpixel": (
            plain[:8] + chunk(b"IHDR", struct.pack(">II5B", 9500, 10000, 8, 2, 0, 0, 0))
            + plain[33:], "limit of 89478485"),
    }  # fmt: skip


def deep_rgb_png() -> bytes:
    """A 16-bit RGB PNG with the photo's values in the high bytes."""
    values = np.asarray(photo()).astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">II5B", *SIZE, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def fewer_colours(png: bytes, count: int) -> bytes:
    """A PNG of palette colours with the first `count` of them."""
    at = png.index(b"PLTE") - 4
    length = struct.unpack_from(">I", png, at)[0]
    assert length > 3 * count
    return png[:at] + chunk(b"PLTE", png[at + 8 : at + 8 + 3 * count]) + png[at + 12 + length :]


def half_png(plain: bytes) -> bytes:
    """All checksums hold, but the compressed data end too early."""
    at = plain.index(b"IDAT")
    length = struct.unpack(">I", plain[at - 4 : at])[0]
    content = plain[at + 4 : at + 4 + length // 2]
    return plain[: at - 4] + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def black_png(size: tuple[int, int], interlaced: bool, missing: int) -> bytes:
    """A black grey PNG whose data come to their end, `missing` bytes before they should."""
    black = np.zeros(size[::-1], np.uint8)
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
    passes = (*passes, (0, 1, 1, 2)) if interlaced else ((0, 0, 1, 1),)
    parts = [black[top::down, left::across] for left, top, across, down in passes]
    data = bytes(sum(part.size + len(part) for part in parts if part.size) - missing)
    header = chunk(b"IHDR", struct.pack(">II5B", *size, 8, 0, 0, 0, interlaced))
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", header, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    )


def tiff(rows: list[bytes], size: tuple[int, int], tags: dict[int, tuple[int, ...]]) -> bytes:
    """An uncompressed little-endian RGB TIFF with a strip for each of `rows`; none: a sparse one,
    at no byte of the file, as GDAL writes them. tags: others, of 16 bits."""
    width, height = size
    places = [8 + sum(map(len, rows[:i])) if row else 0 for i, row in enumerate(rows)]
    entries: dict[int, tuple[int, ...]] = {
        256: (width,), 257: (height,), 258: (8,) * 3, 259: (1,), 262: (2,), 277: (3,), 278: (1,),
        273: tuple(places), 279: tuple(map(len, rows)), **tags,
    }  # fmt: skip
    data = b"".join(rows)
    at = 8 + len(data) + 2 + 12 * len(entries) + 4
    directory, more = struct.pack("<H", len(entries)), b""
    for tag, values in sorted(entries.items()):
        packed = struct.pack(f"<{len(values)}I", *values)
        if tag not in (273, 279):
            packed = struct.pack(f"<{len(values)}H", *values)
        if len(packed) > 4:
            packed, more = struct.pack("<I", at + len(more)), more + packed
        kind = 4 if tag in (273, 279) else 3
        directory += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4) + more


def jpeg_tiff(end: int | None = None, rows: int = 16, flip: int = 0) -> bytes:
    """A TIFF of strips of 16 rows that are JPEGs, one of them cut at its byte `end`, with the byte
    `flip` of its codes inverted, or of other `rows`."""
    strips = [
        encode(photo().crop((0, top, SIZE[0], low)), quality=90, subsampling=0)
        for top in range(0, SIZE[1], 16)
        for low in [min(top + (rows if top == 16 else 16), SIZE[1])]
    ]
    strips[1] = strips[1][:end]
    if flip:
        at = strips[1].index(b"\xff\xda") + 14 + flip
        strips[1] = strips[1][:at] + bytes([strips[1][at] ^ 255]) + strips[1][at + 1 :]
    return tiff(strips, SIZE, {259: (7,), 262: (6,), 278: (16,), 530: (1, 1)})


def fax(compression: str, damaged: int = 0) -> bytes:
    """A TIFF of two colours, of whose codes two bytes are 255 from byte `damaged` on."""
    data = bytearray(encode(photo("1"), "TIFF", compression=compression))
    if damaged:
        data[8 + damaged : 10 + damaged] = b"\xff\xff"
    return bytes(data)


def bmp_rle8(codes: bytes, size: tuple[int, int]) -> bytes:
    """A BMP of these codes with a palette of 256 colours."""
    about = struct.pack("<I2i2H2I2i2I", 40, *size, 1, 8, 1, len(codes), 0, 0, 0, 0)
    palette = bytes(value for grey in range(256) for value in (grey, grey, 255 - grey, 0))
    header = b"BM" + struct.pack("<I2HI", 1078 + len(codes), 0, 0, 1078)
    return header + about + palette + codes


def retagged(tiff: bytes, old: int, new: int) -> bytes:
    """A little-endian TIFF with another photometric interpretation."""
    tag = struct.pack("<HHIH", 262, 3, 1, old)
    assert tiff.count(tag) == 1
    return tiff.replace(tag, tag[:8] + struct.pack("<H", new))


def one_frame(webp: bytes, canvas: tuple[int, int]) -> bytes:
    """An animation whose one frame is the picture of a lossy WebP."""

    def riff(kind: bytes, content: bytes) -> bytes:
        return kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)

    def sides(size: tuple[int, int]) -> bytes:
        return b"".join((side - 1).to_bytes(3, "little") for side in size)

    frame = riff(b"ANMF", bytes(6) + sides(SIZE) + bytes(4) + webp[12:])
    about = riff(b"VP8X", b"\2\0\0\0" + sides(canvas)) + riff(b"ANIM", bytes(6))
    return riff(b"RIFF", b"WEBP" + about + frame)


def others() -> dict[str, tuple[bytes, str]]:
    """GIF, WebP, TIFF, BMP, PPM and what is none of them."""
    gif, webp = encode(photo().quantize(64), "GIF"), encode(photo(), "WEBP", quality=90)
    pair = {"save_all": True, "append_images": [photo().rotate(90)]}
    lzw = encode(photo(), "TIFF", compression="tiff_lzw")
    alpha, extra = "transparent pixels", "4 channels, of which 3"
    flipped = bytearray(encode(photo(), "TIFF", compression="tiff_adobe_deflate"))
    flipped[8 + 3000] ^= 16  # its data begin at byte 8
    broken = bytearray(lzw)
    broken[200:260] = bytes(60)
    signed = (ramp(400, np.float64) - 200).astype(np.int32)
    undecodable = "undecodable"
    two_colours = photo("L").quantize(2)
    two_colours.putpalette([0, 0, 0, 255, 255, 255])
    return {
        "gif": (gif, "converted"), "gif, animated": (encode(photo(), "GIF", **pair), "2 frames"),
        "gif, transparent": (
            encode(photo().quantize(64), "GIF", transparency=photo().quantize(64).getpixel((0, 0))),
            alpha),
        "gif, on a larger canvas": (gif[:6] + struct.pack("<HH", 90, 80) + gif[10:], "on a canvas"),
        "webp, on a larger canvas": (one_frame(webp, (90, 80)), "on a canvas"),
        "webp, animated, of one frame": (one_frame(webp, SIZE), "converted"),
        "gif, cut": (gif[:-1], "no trailer"), "gif, half": (gif[: len(gif) // 2], "truncated"),
        "webp": (webp, "converted"),
        "webp, lossless": (encode(photo(), "WEBP", lossless=True), "converted"),
        "webp, alpha": (encode(with_alpha(0), "WEBP", lossless=True), alpha),
        "webp, animated": (encode(photo(), "WEBP", **pair), "2 frames"),
        "webp, cut": (webp[:-20], "truncated"),
        "tiff": (encode(photo(), "TIFF"), "converted"), "tiff, lzw": (lzw, "converted"),
        "tiff, deflate": (encode(photo(), "TIFF", compression="tiff_adobe_deflate"), "converted"),
        "tiff, packbits": (encode(photo(), "TIFF", compression="packbits"), "converted"),
        "tiff, jpeg": (encode(photo(), "TIFF", compression="jpeg"), "converted"),
        "tiff, group 4": (encode(photo("1"), "TIFF", compression="group4"), "converted"),
        "tiff, group 3": (fax("group3"), "converted"),
        "tiff, group 3, damaged": (fax("group3", 300), undecodable),
        "tiff, group 4, damaged": (fax("group4", 300), undecodable),
        "tiff, fax, damaged": (fax("tiff_ccitt", 300), undecodable),
        "tiff, grey": (encode(photo("L"), "TIFF"), "converted"),
        "tiff, palette": (encode(photo().quantize(16), "TIFF"), "converted"),
        "tiff, cmyk": (encode(photo("CMYK"), "TIFF"), "converted"),
        "tiff, lab": (retagged(encode(photo(), "TIFF"), 2, 8), "LAB colours"),
        "tiff, oriented": (encode(photo(), "TIFF", exif=exif(6)), "converted"),
        "tiff, rgb and nir": (encode(photo("RGBX"), "TIFF"), extra),
        "tiff, alpha": (encode(with_alpha(0), "TIFF"), alpha),
        "tiff, pages": (encode(photo(), "TIFF", save_all=True, append_images=[photo()] * 5),
                        "6 pages"),
        "tiff, float": (deep("TIFF", ramp(1, np.float32)), "32 bits per value (float)"),
        "tiff, int32": (deep("TIFF", ramp(255, np.int32)), "32 bits per value (signed)"),
        "tiff, negative": (deep("TIFF", signed), "32 bits per value (signed)"),
        "tiff, 16 bits": (deep("TIFF", ramp(65535, np.uint16)), "16 bits per value"),
        "tiff, 16 bits, 0 is white": (
            retagged(deep("TIFF", ramp(65535, np.uint16)), 1, 0), "whose 0 is white"),
        "tiff, 0 is white": (retagged(encode(photo("L"), "TIFF"), 1, 0), "converted"),
        "tiff, deflate, flipped": (bytes(flipped), undecodable),
        "tiff, cut": (encode(photo(), "TIFF")[:-4000], undecodable),
        "tiff, broken": (bytes(broken), undecodable),
        "tiff, sparse": (tiff([b"\x07" * 24, b"", b"\x09" * 24], (8, 3), {}), undecodable),
        "tiff, strips too few": (tiff([b"\x07" * 24] * 2, (8, 3), {}), undecodable),
        "tiff, jpeg of strips": (jpeg_tiff(), "converted"),
        "tiff, jpeg of which a strip is cut": (jpeg_tiff(-200), undecodable),
        "tiff, jpeg of which a strip is short": (jpeg_tiff(rows=8), undecodable),
        "tiff, jpeg of damaged codes": (jpeg_tiff(flip=40), undecodable),
        "tiff, old-style jpeg": (tiff([b"\x07" * 24] * 3, (8, 3), {259: (6,)}), "old-style JPEG"),
        "tiff, a strip in its header": (
            tiff([b"\x07" * 24] * 3, (8, 3), {}).replace(
                struct.pack("<3I", 8, 32, 56), struct.pack("<3I", 8, 0, 56)), undecodable),
        "tiff, a preview": (tiff([b"\x07" * 24] * 3, (8, 3), {254: (1,), 330: (8,)}), "a preview"),
        "tiff, palette of 8 bits": (
            tiff([bytes(8)], (8, 1), {258: (8,), 262: (3,), 277: (1,), 320: (*range(256),) * 3}),
            "values of 8 bits"),
        "bmp": (encode(photo(), "BMP"), "converted"),
        "bmp, black and white of 8 bits": (encode(two_colours, "BMP"), "black and white"),
        "bmp, cut": (encode(photo(), "BMP")[:-900], undecodable),
        "bmp, rle4": (
            b"BM" + struct.pack("<I2HI", 124, 0, 0, 118)
            + struct.pack("<I2i2H2I2i2I", 40, 5, 1, 1, 4, 2, 6, 0, 0, 0, 0)
            + bytes(range(64)) + b"\0\5\x12\x34\x50\0\0\1", "RLE4"),
        "bmp, rle8": (bmp_rle8(b"\5\x12\0\0\0\3abc\0\2\x34\0\1", (5, 2)), "converted"),
        "bmp, rle8 that moves on": (
            bmp_rle8(b"\5\x12\0\0\2\x34\0\2\3\0\0\1", (5, 2)), "do not fill row 1"),
        "bmp, rle8 of a short row": (
            bmp_rle8(b"\4\x12\0\0\5\x34\0\1", (5, 2)), "do not fill row 0"),
        "ppm": (encode(photo(), "PPM"), "converted"),
        "ppm, two": (encode(photo(), "PPM") * 2, "several pictures"),
        "pbm, two": (encode(photo("1"), "PPM") * 2, "several pictures"),
        "pgm as text, two": (b"P2\n# P2 \n2 1\n255\n1 2\nP2 2 1 255 3 4\n", "several pictures"),
        "pgm as text": (b"P2\n# P2 \n2 1\n255\n1 2 # P3 \n", "converted"),
        "pgm": (encode(photo("L"), "PPM"), "converted"),
        "pgm, 16 bits": (b"P5 3 2 65535\n" + bytes(12), "16 bits per value"),
        "pgm, 12 bits": (b"P5 3 2 4095\n" + bytes(12), "16 bits per value"),
        "ppm, 12 bits": (b"P6 3 2 4095\n" + bytes(36), "16 bits per value"),
        "pfm": (b"Pf 3 2 -1\n" + bytes(24), "32 bits per value (float)"),
        "heic": (b"\0\0\0\x18ftypheic" + bytes(99), "a HEIC image; convert it"),
        "heic of 10 bits": (b"\0\0\0\x18ftypheix" + bytes(99), "a HEIC image; convert it"),
        "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        "text": (b"this is text", "not an image in a known format"),
        "empty": (b"", "the file is empty"),
    }  # fmt: skip


@cache
def corpus() -> dict[str, tuple[bytes, str]]:
    """Name → (bytes, verdict) of every file."""
    parts = {"jpeg": jpegs() | refused_jpegs(), "png": pngs(), "": others()}
    return {
        f"{kind} {name}".strip(): entry
        for kind, files in parts.items()
        for name, entry in files.items()
    }

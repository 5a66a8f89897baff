"""Image files as the world sends them: 200 that are broken, huge, odd or no images at all."""

import io
import random
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, features

AVIF = features.check("avif")  # PIL reads it from 11.3
_PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _big_endian_grey_tiff() -> bytes:
    """PIL writes little-endian files only."""
    pixels = (_PIXELS[..., 0].astype(">u2") * 257).tobytes()
    entries = {256: 60, 257: 40, 258: 16, 259: 1, 262: 1, 273: 8, 277: 1, 278: 40, 279: len(pixels)}
    directory = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in entries.items())
    header = b"MM\x00*" + struct.pack(">I", 8 + len(pixels))
    return header + pixels + struct.pack(">H", len(entries)) + directory + bytes(4)


def right_images() -> dict[str, bytes]:
    """Files of unusual kinds that must be read right."""
    rgba = Image.fromarray(_PIXELS)
    rgb = rgba.convert("RGB")
    grey16 = Image.fromarray(_PIXELS[..., 0].astype(np.uint16) * 257)
    palette = rgb.quantize(16)
    rotated = Image.Exif()
    rotated[274] = 6
    mirrored = Image.Exif()
    mirrored[274] = 5
    avif = {
        "plain.avif": (rgb, {}),
        "transparent.avif": (rgba, {}),
        "rotated.avif": (rgb, {"exif": rotated}),
    }
    avif = {name: encoded(image, "AVIF", **options) for name, (image, options) in avif.items() if AVIF}
    frames = [rgb, rgb.rotate(90), rgb.rotate(180)]
    animated = {"save_all": True, "append_images": frames[1:]}
    return {
        "rgb.png": encoded(rgb, "PNG"),
        "rgb.jpg": encoded(rgb, "JPEG", quality=95),
        "grey.jpg": encoded(rgb.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True),
        "rotated.jpg": encoded(rgb, "JPEG", exif=rotated),
        "rotated.png": encoded(rgb, "PNG", exif=rotated),
        "transparent.png": encoded(rgba, "PNG"),
        "grey_transparent.png": encoded(rgba.convert("LA"), "PNG"),
        "one_bit.png": encoded(rgb.convert("1"), "PNG"),
        "sixteen_bit.png": encoded(grey16, "PNG"),
        "sixteen_bit.tif": encoded(grey16, "TIFF"),
        "palette.png": encoded(palette, "PNG"),
        "palette_transparent.png": encoded(palette, "PNG", transparency=3),
        "palette_transparent.gif": encoded(palette, "GIF", transparency=3),
        "animated.gif": encoded(rgb, "GIF", **animated),
        "animated.webp": encoded(rgb, "WEBP", lossless=True, **animated),
        "animated.png": encoded(rgb, "PNG", **animated),
        "lossless.webp": encoded(rgba, "WEBP", lossless=True),
        "plain.bmp": encoded(rgb, "BMP"),
        "compressed.tif": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "cmyk.tif": encoded(rgb.convert("CMYK"), "TIFF"),
        "big_endian_grey.tif": _big_endian_grey_tiff(),
        "rotated.tif": encoded(rgb, "TIFF", exif=rotated),
        "rotated.webp": encoded(rgb, "WEBP", lossless=True, exif=rotated),
        "mirrored.jfif": encoded(rgb, "JPEG", exif=mirrored),
        "grey_transparent.tif": encoded(rgba.convert("LA"), "TIFF"),
        "palette_with_alphas.png": encoded(palette, "PNG", transparency=bytes(range(0, 256, 16))),
        "plain.ppm": encoded(rgb, "PPM"),
        **avif,
        "one_pixel.png": encoded(rgb.resize((1, 1)), "PNG"),
        "narrow.png": encoded(rgb.resize((2, 80)), "PNG"),
    }


def images_of_unknown_range() -> dict[str, bytes]:
    """Files of 32-bit numbers, which say not which number is white."""
    grey = _PIXELS[..., 0]
    numbers = {
        "fractions.tif": grey.astype(np.float32) / 255,
        "large_fractions.tif": grey.astype(np.float32) * 1000,
        "large.tif": grey.astype(np.int32) * 1000,
        "negative.tif": grey.astype(np.int32) - 128,
    }
    return {name: encoded(Image.fromarray(pixels), "TIFF") for name, pixels in numbers.items()}


def _png(width: int, height: int, content: bytes, extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def _bombs() -> dict[str, bytes]:
    rows = zlib.compressobj(9)
    black = b"".join(rows.compress(bytes(20001)) for _ in range(20000)) + rows.flush()  # 400 million pixels in 390 kB
    text = zlib.compress(bytes(200 * 2**20), 9)
    body = b"Comment\0\0" + text
    comment = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros", bytes(2**24))
    gif = bytearray(right_images()["animated.gif"])
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    return {
        "black.png": _png(20000, 20000, black),
        "claims_much.png": _png(100_000, 100_000, zlib.compress(b"\0\0")),
        "just_too_many.png": _png(13_400, 13_400, zlib.compress(b"\0" * 100)),
        "no_width.png": _png(0, 10, zlib.compress(b"")),
        "line.png": _png(60_000, 2, zlib.compress(bytes(2 * 60_001))),
        "thread.png": _png(1, 40_000, zlib.compress(bytes(2 * 40_000))),
        "comment.png": _png(4, 4, zlib.compress(bytes(20)), comment),
        "screen.gif": bytes(gif),
        "archive.zip": archive.getvalue(),
        "huge.bmp": b"BM" + bytes(25 * 2**20),
    }


def _no_images() -> dict[str, bytes]:
    tiff_loop = b"II*\0\x08\0\0\0" + struct.pack("<H", 0) + struct.pack("<I", 8)
    return {
        "empty.png": b"",
        "one_byte.jpg": b"\xff",
        "text.png": b"this is no image\n" * 50,
        "page.html": b"<html><script>alert(1)</script></html>",
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) (w) file\n%%EOF\n",
        "document.pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n%%EOF\n",
        "film.mp4": b"\0\0\0\x18ftypmp42" + bytes(200),
        "program.exe": b"MZ" + bytes(300),
        "loop.tif": tiff_loop,
        "pickle.pt": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "zeros.gif": bytes(1000),
    }


def hostile_images(total: int = 200) -> dict[str, bytes]:
    """`total` files by name: bombs, no images, and right images cut off or with bytes changed."""
    rng = random.Random(0)
    files = {**_bombs(), **_no_images()}
    right = right_images()
    while len(files) < total:
        name, content = rng.choice(sorted(right.items()))
        broken = bytearray(content)
        if rng.random() < 0.4:
            del broken[rng.randrange(len(broken)) :]
        else:
            for _ in range(rng.choice((1, 3, 20))):
                broken[rng.randrange(min(len(broken), rng.choice((40, len(broken)))))] = rng.randrange(256)
        files[f"{len(files)}_{name}"] = bytes(broken)
    return files


def resident_mebibytes() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


_watching: list[list[str]] = []


def _audit(event: str, arguments: tuple) -> None:
    if event == "open" and _watching and isinstance(arguments[0], str | bytes):
        path, mode, flags = arguments
        if set(mode or "") & set("wax+") or (isinstance(flags, int) and flags & 0o103):  # O_WRONLY, O_RDWR, O_CREAT
            _watching[-1].append(str(path))
    if event in ("os.remove", "os.rename", "os.mkdir", "subprocess.Popen", "os.system", "socket.connect") and _watching:
        _watching[-1].append(f"{event} {arguments[:2]}")


sys.addaudithook(_audit)


@contextmanager
def watched() -> Iterator[list[str]]:
    """Lists what is written, removed, started or connected to."""
    _watching.append([])
    try:
        yield _watching[-1]
    finally:
        _watching.pop()

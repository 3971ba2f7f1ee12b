"""Every kind of file gives the RGB values that it shows, or a BadImage that says why not."""

import base64
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tlcli.data import decode
from tlcli.data.decode import BadImage, raw_image, read_image, read_raw

GRADIENT = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


def saved(tmp_path: Path, image: Image.Image, name: str, **options: Any) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


def close(pixels: np.ndarray, expected: Any, tolerance: int = 0) -> None:
    """Assert that an image is uint8 RGB with these values, up to the loss of its format."""
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert np.abs(pixels.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("a.png", {}, 0),
        ("a.bmp", {}, 0),
        ("a.webp", {"lossless": True}, 0),
        ("a.avif", {"quality": 100, "subsampling": "4:4:4"}, 8),
        ("a.JPG", {"quality": 100, "subsampling": 0}, 8),
    ],
)
def test_rgb_is_itself(tmp_path: Path, name: str, options: dict[str, Any], tolerance: int) -> None:
    rgb = read_image(saved(tmp_path, Image.fromarray(GRADIENT), name, **options))
    assert rgb.flags.writeable
    close(rgb, GRADIENT, tolerance)


@pytest.mark.parametrize(
    ("mode", "color", "want"),
    [
        ("L", 77, 77),
        ("LA", (100, 0), 255),
        ("LA", (100, 255), 100),
        ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
        ("RGBA", (10, 20, 30, 0), 255),
        ("I;16", 65535, 255),
        ("CMYK", (255, 0, 0, 0), [0, 255, 255]),
        ("I;16B", 65535, 255),
        ("I", 0, 128),
        ("I", 2**31 - 1, 255),
        ("F", 0.5, 128),
        ("F", float("nan"), 0),
        ("F", float("inf"), 255),
        ("RGBa", (0, 0, 0, 0), 255),
        ("PA", (0, 0), 255),
        ("RGBX", (255, 255, 255, 0), 255),
    ],
)
def test_modes(tmp_path: Path, mode: str, color: Any, want: Any) -> None:
    image = Image.new(mode, (3, 2), color)
    if mode in ("RGBa", "PA", "RGBX"):  # these modes are in memory only
        close(raw_image(image).to_pixels(None), want)
    else:
        close(read_image(saved(tmp_path, image, "a.tif" if mode in ("CMYK", "I;16B", "I", "F") else "a.png")), want)


def test_cmyk_jpeg_and_deep_pgm(tmp_path: Path) -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    close(read_image(saved(tmp_path, image, "a.jpg", quality=100)), [255, 0, 0], 4)
    (tmp_path / "a.pgm").write_bytes(b"P5 1 1 65535\n" + struct.pack(">H", 257 * 200))
    close(read_image(tmp_path / "a.pgm"), 200)


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])], ids=["an index", "a byte per color"])
def test_palette(tmp_path: Path, transparency: Any) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    close(read_image(saved(tmp_path, image, "opaque.png")), [[[10, 20, 30], [40, 50, 60]]])
    clear = saved(tmp_path, image, "clear.png", transparency=transparency)
    close(read_image(clear), [[[255, 255, 255], [40, 50, 60]]])


@pytest.mark.parametrize("name", ["a.png", "alpha.png", "a.tif", "deflated.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = Image.Transpose
    inverse = dict(enumerate([turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE], start=2))
    inverse |= dict(enumerate([turn.ROTATE_90, turn.TRANSVERSE, turn.ROTATE_270], start=6))
    image = Image.fromarray(GRADIENT).convert("RGBA" if name == "alpha.png" else "RGB")
    image = image.transpose(inverse[orientation]) if orientation in inverse else image
    options = {"compression": "tiff_adobe_deflate"} if name.startswith("deflated") else {}
    close(read_image(saved(tmp_path, image, name, exif=exif, **options)), GRADIENT)


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"])
def test_damaged_exif_leaves_the_pixels(tmp_path: Path, exif: bytes) -> None:
    close(read_image(saved(tmp_path, Image.new("RGB", (8, 8), (50, 50, 50)), "a.jpg", exif=exif)), 50)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif", "a.jpg"])
def test_first_frame(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    options = {"a.webp": {"lossless": True}, "a.jpg": {"format": "MPO"}}.get(name, {})
    path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
    close(read_image(path), [255, 0, 0], 2)


def png(width: int, height: int, bits: int = 8, rows: bytes = b"") -> bytes:
    """Return an RGB file of these rows, each with its filter in front. Pillow writes none of 16 bits."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_large_is_not_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, Image.fromarray(GRADIENT), "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # 24 pixels: Pillow warns, and pytest makes that an error
    close(read_image(path), GRADIENT)
    with ThreadPoolExecutor(4) as pool:
        assert all(np.array_equal(rgb, GRADIENT) for rgb in pool.map(read_image, [path] * 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 11)
    with pytest.raises(BadImage, match="decompression bomb"):
        read_image(path)


@pytest.fixture
def enough(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(decode, "MIN_REDUCED_SIDE", 16)
    return 16


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Soft shapes, as lenses give them."""
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize(
    ("size", "want"), [((40, 31), (40, 31)), ((40, 32), (20, 16)), ((131, 129), (17, 17)), ((4000, 1), (4000, 1))]
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_large_jpeg_is_decoded_to_as_much_as_is_enough(tmp_path: Path, enough: int, size, want, mode) -> None:
    rgb = read_image(saved(tmp_path, photograph(*size, mode=mode), "a.jpg", quality=95))
    assert rgb.shape == (want[1], want[0], 3)
    assert min(want) >= min(enough, *size)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_reduced_is_what_shrinking_the_whole_gives(tmp_path, monkeypatch, options: dict[str, Any]) -> None:
    path = saved(tmp_path, photograph(256, 192), "a.jpg", quality=95, **options)
    whole = Image.fromarray(read_image(path))
    monkeypatch.setattr(decode, "MIN_REDUCED_SIDE", 48)
    reduced, wanted = read_image(path), np.asarray(whole.resize((64, 48), Image.Resampling.BOX))
    close(reduced, wanted, 8)
    assert np.abs(reduced.astype(int) - wanted).mean() < 1


def test_a_reduced_photograph_is_upright_and_whole(tmp_path: Path, enough: int) -> None:
    image, exif = photograph(64, 32), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    upright = read_image(saved(tmp_path, image.transpose(Image.Transpose.ROTATE_270), "a.jpg", quality=95))
    turned = saved(tmp_path, image, "b.jpg", quality=95, exif=exif)
    assert read_image(turned).shape == upright.shape == (32, 16, 3)
    assert np.abs(read_image(turned).astype(int) - upright).mean() < 2
    turned.write_bytes(turned.read_bytes()[:-300])
    with pytest.raises(BadImage, match="truncated"):
        read_image(turned)


HEIC = zlib.decompress(
    base64.b85decode(
        r"c-muNV30{GsVvAy%}izhg51nBLl8SRGck>Uf$?~5YDppk1Sn>t<P<^K3<a6VB@Af5Br_);Y>0~k0}}%yh{gCCLIZ&}Pz(r|%-|v_"
        r"Kx~njnU@CUfn-I2oK&zfpqh-bWJ3ldK}L`g*NRNAa=wDhl3WI;N=CNKf}#Q-`)OuDaz2nQ1?qKXWCjUM04tLF!0_kqj~@&S{LBeJ"
        r"9TE<VJdFSUgA_1>R4{{(+%6`EM4+Um6C)#<%mRf*)@iTS&3g7galwHG1_qu6kZ?;9P&Jzi<H6#Coj^N;lk;<m@{)5ZfTFw%Y(OOp"
        r"BALYnsZifKK(R)0P9n%*5)ijD2!QDS|Nq|rg#nPh01XR)g3O9ckVa+>4h|s2nOT%y0(1_8WM)AwEKV4Kes5%AW^HK$a-=egQq!Ok"
        r"e90-r$>3N3*-@UGk_d_}cMZn%!ip;-GM<_S|D8O&i6NSQr2)51=4Q9<6!9&IH$v1JR$Y<u{-VE#`+4=ry;(gOUp)d<lP6AjJb(44"
        r"?b90Azq1|PY4gGdXcQYHCVYJvw17Mg21Z69P+);V1mXe!Q4)LQ"
    )
)
"""24 by 16 pixels, red and blue, with the EXIF orientation 6."""


def test_heic(tmp_path: Path) -> None:
    pytest.importorskip("pi_heif")
    (tmp_path / "a.heic").write_bytes(HEIC)
    pixels = read_image(tmp_path / "a.heic")
    assert pixels.shape == (24, 16, 3)
    close(pixels[[[3, -3]], 3], [[200, 30, 30], [30, 30, 200]], 6)


def test_heic_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    with pytest.raises(BadImage, match=r"pip install 'tlcli\[heif\]'"):
        read_image(tmp_path / "a.heic")


def test_text_of_a_png_is_not_its_depth(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("bit_depth", "sixteen")
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "a.png", pnginfo=info)
    assert read_image(tmp_path / "a.png").tolist() == [[[1, 2, 3]] * 4] * 4


def test_a_bmp_of_16_bits_per_pixel_is_no_deep_image(tmp_path: Path) -> None:
    """Its colors have 5 or 6 bits."""
    header = struct.pack("<2sI2HI", b"BM", 70, 0, 0, 66)
    header += struct.pack("<I2i2H2I2i2I", 40, 1, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    (tmp_path / "a.bmp").write_bytes(header + struct.pack("<3I2H", 0xF800, 0x7E0, 0x1F, 0xF800, 0))
    raw = read_raw(tmp_path / "a.bmp")
    assert (raw.values.tolist(), raw.is_reduced) == ([[[255, 0, 0]]], False)


def test_unsigned_tiff_of_32_bits_does_not_wrap(tmp_path: Path) -> None:
    values = np.array([[0, 2**31 + 5, 2**32 - 1]], dtype=np.uint32)
    tags = {256: 3, 257: 1, 258: 32, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 12, 339: 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = b"II*\0" + struct.pack("<I", 20) + values.tobytes() + struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(content)
    assert read_raw(tmp_path / "a.tif").values.tolist() == values.tolist()
    assert read_image(tmp_path / "a.tif")[0, :, 0].tolist() == [0, 128, 255]

"""Decoding: what every kind of image file becomes, and what is no image."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from qvit_jax.data import bare_loop, batches, decode
from qvit_jax.data.decode import BadImageError, read_image

MOST = 2**26


def noise(h=6, w=9, channels=3, seed=0):
  values = np.random.default_rng(seed).integers(0, 256, (h, w, channels))
  return values.astype(np.uint8)


def save(path, pixels, **options):
  """Writes pixels [h, w, c] or a Pillow image; returns the path."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if not isinstance(pixels, Image.Image):
    pixels = Image.fromarray(np.squeeze(pixels))
  pixels.save(path, **options)
  return str(path)


def read(path, **options):
  return read_image(str(path), **{'max_pixels': MOST, **options})


def grey(pixels):
  return np.repeat(np.asarray(pixels)[..., None], 3, axis=-1)


# Conversions.


@pytest.mark.parametrize('suffix', ['png', 'bmp', 'tif', 'webp'])
def test_colours_come_out_as_stored(tmp_path, suffix):
  options = {'lossless': True} if suffix == 'webp' else {}
  path = save(tmp_path / f'a.{suffix}', noise(), **options)
  found = read(path)
  assert found.dtype == np.uint8
  np.testing.assert_array_equal(found, noise())


def test_the_content_counts_not_the_suffix(tmp_path):
  path = save(tmp_path / 'a.png', noise())
  os.rename(path, tmp_path / 'b.jpg')
  np.testing.assert_array_equal(read(tmp_path / 'b.jpg'), noise())


def test_grey_is_repeated(tmp_path):
  pixels = noise(channels=1)
  for suffix in ('png', 'bmp', 'gif', 'tif'):
    found = read(save(tmp_path / f'a.{suffix}', pixels))
    np.testing.assert_array_equal(found, grey(pixels[..., 0]))


def test_one_bit_is_black_and_white(tmp_path):
  bits = noise()[..., 0] > 127
  for suffix in ('png', 'tif', 'bmp'):
    image = Image.fromarray(bits).convert('1')
    found = read(save(tmp_path / f'a.{suffix}', image))
    np.testing.assert_array_equal(found, grey(bits * np.uint8(255)))


def test_palette_is_looked_up(tmp_path):
  image = Image.fromarray(noise()).quantize(7)
  for suffix in ('png', 'gif', 'bmp'):
    found = read(save(tmp_path / f'a.{suffix}', image))
    np.testing.assert_array_equal(found, np.asarray(image.convert('RGB')))


def test_transparent_pixels_lie_on_white(tmp_path):
  rgba = noise(channels=4)
  rgba[0, :, 3], rgba[1, :, 3] = 0, 255
  found = read(save(tmp_path / 'a.png', rgba))
  share = rgba[..., 3:] / 255
  expected = rgba[..., :3] * share + 255 * (1 - share)
  np.testing.assert_allclose(found, expected, atol=1)
  assert (found[0] == 255).all()
  np.testing.assert_array_equal(found[1], rgba[1, :, :3])


def test_grey_with_transparency_lies_on_white(tmp_path):
  both = noise(channels=2)
  parts = [Image.fromarray(both[..., i]) for i in range(2)]
  image = Image.merge('LA', parts)
  found = read(save(tmp_path / 'a.png', image))
  share = both[..., 1] / 255
  expected = both[..., 0] * share + 255 * (1 - share)
  np.testing.assert_allclose(found, grey(expected), atol=1)


def test_a_transparent_entry_of_a_palette_is_white(tmp_path):
  image = Image.fromarray(noise()).quantize(5)
  index = np.asarray(image)
  colours = np.asarray(image.convert('RGB'))
  expected = np.where((index == 2)[..., None], 255, colours)
  for suffix in ('png', 'gif'):
    found = read(save(tmp_path / f'a.{suffix}', image, transparency=2))
    np.testing.assert_array_equal(found, expected)
  alphas = bytes([255, 255, 0, 255, 255])
  found = read(save(tmp_path / 'b.png', image, transparency=alphas))
  np.testing.assert_array_equal(found, expected)


def test_a_transparent_colour_is_white(tmp_path):
  pixels = np.full((2, 2, 3), 9, np.uint8)
  pixels[0, 0] = 1, 2, 3
  found = read(save(tmp_path / 'a.png', pixels, transparency=(1, 2, 3)))
  assert found[0, 0].tolist() == [255] * 3 and found[1, 1].tolist() == [9] * 3


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
  values = np.array([[0, 255, 256, 1000], [32768, 40000, 65279, 65535]])
  path = save(tmp_path / f'a.{suffix}', values.astype(np.uint16))
  np.testing.assert_array_equal(read(path), grey(values // 256))


def test_big_endian_sixteen_bits_are_the_same(tmp_path):
  values = np.array([[0, 256, 40000, 65535]])
  image = Image.frombytes('I;16B', (4, 1), values.astype('>u2').tobytes())
  np.testing.assert_array_equal(
    read(save(tmp_path / 'a.tif', image)), grey(values // 256)
  )


def png(width, height, depth, colour, rows):
  """The bytes of a PNG whose filtered rows are given."""
  chunk = lambda kind, data: (
    struct.pack('>I', len(data)) + kind + data
    + struct.pack('>I', zlib.crc32(kind + data))
  )  # fmt: skip
  header = struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)
  return (
    b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header)
    + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
  )  # fmt: skip


def test_sixteen_bit_colours_are_scaled_like_grey(tmp_path):
  values = np.array([[[0, 300, 65535], [40000, 255, 256]]], '>u2')
  (tmp_path / 'a.png').write_bytes(png(2, 1, 16, 2, b'\0' + values.tobytes()))
  np.testing.assert_array_equal(read(tmp_path / 'a.png'), values // 256)


def test_cmyk_is_converted(tmp_path):
  inks = np.zeros((8, 8, 4), np.uint8)
  inks[:4, :, 0], inks[4:, :, 3] = 255, 255  # cyan above, black below
  for suffix, slack in (('tif', 0), ('jpg', 3)):
    path = save(tmp_path / f'a.{suffix}', Image.fromarray(inks, 'CMYK'))
    found = read(path).astype(int)
    assert np.abs(found[:4] - [0, 255, 255]).max() <= slack
    assert np.abs(found[4:]).max() <= slack


def test_jpegs_baseline_progressive_and_grey(tmp_path):
  smooth = np.linspace(0, 255, 32 * 32).reshape(32, 32).astype(np.uint8)
  for name, options in (('a', {}), ('b', {'progressive': True})):
    path = save(tmp_path / f'{name}.jpg', grey(smooth), quality=95, **options)
    assert np.abs(read(path).astype(int) - grey(smooth)).max() < 8
  path = save(tmp_path / 'c.jpg', smooth[..., None], quality=95)
  assert np.abs(read(path).astype(int) - grey(smooth)).max() < 8


@pytest.mark.parametrize('suffix', ['gif', 'png', 'webp', 'tif'])
def test_of_an_animation_the_first_frame_counts(tmp_path, suffix):
  first, *more = (Image.new('RGB', (4, 4), c) for c in ('red', 'lime', 'blue'))
  options = {'lossless': True} if suffix == 'webp' else {}
  path = save(
    tmp_path / f'a.{suffix}', first, save_all=True, append_images=more,
    **options,
  )  # fmt: skip
  assert (read(path) == [255, 0, 0]).all()


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'tif'])
@pytest.mark.parametrize('turn', range(1, 9))
def test_images_are_turned_as_their_tag_says(tmp_path, suffix, turn):
  pixels = np.zeros((16, 24, 3), np.uint8)
  pixels[:8, :8], pixels[:8, 8:] = (255, 0, 0), (0, 255, 0)
  exif = Image.Exif()
  exif[0x0112] = turn
  options = {'lossless': True} if suffix == 'webp' else {}
  path = save(tmp_path / f'a.{suffix}', pixels, exif=exif, **options)
  upright = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
  }[turn](pixels)
  found = read(path)
  assert found.shape == upright.shape
  assert np.abs(found.astype(int) - upright).mean() < 12


def test_large_jpegs_are_scaled_while_they_are_decoded(tmp_path):
  ramp = np.linspace(0, 255, 512).astype(np.uint8)
  path = save(tmp_path / 'a.jpg', grey(np.tile(ramp, (256, 1))), quality=95)
  assert read(path).shape == (256, 512, 3)
  assert read(path, size=100).shape == (256, 512, 3)
  small = read(path, size=32)
  assert small.shape == (64, 128, 3)
  whole, part = batches.fit(read(path), 32), batches.fit(small, 32)
  assert np.abs(whole.astype(int) - part).max() < 6


def test_of_a_very_long_image_the_middle_counts():
  image = np.zeros((1, 20_000_000, 3), np.uint8)  # 4 GB a line when resized
  image[:, 9_999_000:10_001_000] = 200
  assert (batches.fit(image, 224) == 200).all()
  turned = batches.fit(image.swapaxes(0, 1), 224)
  assert turned.shape == (224, 224, 3) and (turned == 200).all()


@pytest.mark.parametrize('method', ['bicubic', 'bilinear'])
def test_images_are_resized_by_the_method_that_is_asked_for(method):
  found = batches.fit(noise(16, 16), 8, resize=method)
  way = Image.Resampling[method.upper()]
  expected = np.asarray(Image.fromarray(noise(16, 16)).resize((8, 8), way))
  np.testing.assert_array_equal(found, expected)


# Files that are no images.


def broken_files(folder):
  """Writes files that cannot be decoded; returns {name: part of the reason}."""
  jpeg, png_file = io.BytesIO(), io.BytesIO()
  Image.fromarray(noise(64, 64)).save(jpeg, 'JPEG')
  Image.fromarray(noise(64, 64)).save(png_file, 'PNG')
  jpeg, whole = jpeg.getvalue(), png_file.getvalue()
  wide = png(50_000, 50_000, 8, 2, b'\0' * 1000)
  tiff, gif, webp, bmp, jp2, ppm = (io.BytesIO() for _ in range(6))
  Image.fromarray(noise(64, 64)).save(tiff, 'TIFF')
  Image.fromarray(noise(64, 64)).save(gif, 'GIF')
  Image.fromarray(noise(64, 64)).save(webp, 'WEBP')
  Image.fromarray(noise(64, 64)).save(bmp, 'BMP')
  Image.fromarray(noise(64, 64)).save(ppm, 'PPM')
  Image.new('F', (4, 4)).save(floats := io.BytesIO(), 'TIFF')
  Image.new('I', (4, 4)).save(ints := io.BytesIO(), 'TIFF')
  none = 'none of JPEG, PNG, GIF'
  flipped = bytearray(whole)
  flipped[60] ^= 0xFF
  files = {
    'empty.jpg': (b'', 'empty'),
    'one_byte.jpg': (b'\xff', none),
    'text.jpg': (b'no image at all\n', none),
    'html.png': (b'<!doctype html><p>404', none),
    'zeros.jpg': (bytes(500), none),
    'half.jpg': (jpeg[: len(jpeg) // 2], 'truncated'),
    'head.jpg': (jpeg[:100], ''),
    'magic.jpg': (jpeg[:4], ''),
    'half.png': (whole[: len(whole) // 2], 'truncated'),
    'head.png': (whole[:40], ''),
    'magic.png': (whole[:8], ''),
    'flipped.png': (bytes(flipped), ''),
    'wide.png': (wide, '2500000000 pixels'),
    'zero_wide.png': (png(0, 0, 8, 2, b''), ''),
    'half.gif': (gif.getvalue()[: len(gif.getvalue()) // 2], ''),
    'magic.gif': (b'GIF89a', ''),
    'half.webp': (webp.getvalue()[: len(webp.getvalue()) // 2], ''),
    'half.bmp': (bmp.getvalue()[: len(bmp.getvalue()) // 2], 'truncated'),
    'magic.bmp': (b'BM', ''),
    'half.tif': (tiff.getvalue()[:100], ''),
    'magic.tif': (b'II*\0', ''),
    'floats.tif': (floats.getvalue(), 'no known range'),
    'ints.tif': (ints.getvalue(), 'no known range'),
    'other.png': (ppm.getvalue(), none),
    'script.jpg': (b'%!PS-Adobe-3.0 EPSF-3.0\n', none),
    'pdf.jpg': (b'%PDF-1.7\n', none),
    'photoshop.jpg': (b'8BPS\0\1' + bytes(40), none),
    'zip.jpg': (b'PK\3\4' + bytes(40), none),
    'lfs.jpg': (b'version https://git-lfs.github.com/spec/v1\n', none),
  }
  folder.mkdir(parents=True, exist_ok=True)
  for name, (content, _) in files.items():
    (folder / name).write_bytes(content)
  return {name: reason for name, (_, reason) in files.items()}


def odd_files(folder):
  """Writes unusual files that are images all the same; returns their names."""
  colour, exif = Image.fromarray(noise(12, 8)), Image.Exif()
  exif[0x0112] = 6
  frames = {'save_all': True, 'append_images': [colour.rotate(180)]}
  deep = Image.fromarray(noise(12, 8, 1)[..., 0].astype(np.uint16) * 257)
  files = {
    'animated.gif': (colour, frames),
    'animated.png': (colour, frames),
    'animated.webp': (colour, frames),
    'cmyk.jpg': (colour.convert('CMYK'), {}),
    'deep.png': (deep, {}),
    'deep.tif': (deep, {}),
    'turned.jpg': (colour, {'exif': exif}),
    'turned.png': (colour, {'exif': exif}),
    'grey.jpg': (colour.convert('L'), {}),
    'palette.png': (colour.convert('P'), {'transparency': 0}),
    'bilevel.png': (colour.convert('1'), {}),
    'alpha.png': (colour.convert('RGBA'), {}),
    'alpha_grey.png': (colour.convert('LA'), {}),
    'progressive.jpg': (colour, {'progressive': True}),
  }
  for name, (image, options) in files.items():
    save(folder / name, image, **options)
  return list(files)


def test_odd_files_are_images(tmp_path):
  for name in odd_files(tmp_path):
    found = read(tmp_path / name)
    shape = (8, 12, 3) if name.startswith('turned') else (12, 8, 3)
    assert found.dtype == np.uint8 and found.shape == shape, name
    assert np.ptp(found) > 100, name


def test_broken_files_are_bad_images_with_a_reason(tmp_path):
  broken = broken_files(tmp_path)
  assert len(broken) > 28
  for name, part in broken.items():
    with pytest.raises(BadImageError) as error:
      read(tmp_path / name)
    assert part in str(error.value), name
    assert '\n' not in str(error.value) and str(tmp_path) not in str(
      error.value
    )


def test_the_bare_loop_passes_over_broken_files(tmp_path):
  names = [str(tmp_path / name) for name in broken_files(tmp_path)]
  started, ended = bare_loop._decode(names)
  assert ended >= started


def test_other_things_than_files_are_bad_images(tmp_path):
  (tmp_path / 'x.jpg').mkdir()
  with pytest.raises(BadImageError, match='Is a directory'):
    read(tmp_path / 'x.jpg')
  with pytest.raises(BadImageError, match='No such file'):
    read(tmp_path / 'gone.jpg')


def test_unreadable_files_are_bad_images(tmp_path):
  path = save(tmp_path / 'a.png', noise())
  os.chmod(path, 0)
  if os.access(path, os.R_OK):
    pytest.skip('root reads everything')
  with pytest.raises(BadImageError, match='Permission denied'):
    read(path)


def test_the_pixel_cap_counts_before_memory_is_taken(tmp_path):
  path = save(tmp_path / 'a.png', noise(10, 20))
  assert read(path, max_pixels=200).shape == (10, 20, 3)
  with pytest.raises(BadImageError, match='200 pixels .* data.max_pixels=199'):
    read(path, max_pixels=199)
  # Of so many Pillow itself only warns.
  (tmp_path / 'b.png').write_bytes(png(10_000, 10_000, 8, 2, b'\0'))
  with pytest.raises(BadImageError, match='100000000 pixels are more'):
    read(tmp_path / 'b.png', max_pixels=89_478_485)


def test_names_that_are_no_text_can_be_read_and_printed(tmp_path):
  path = os.path.join(os.fsencode(tmp_path), b'caf\xe9.png')
  Image.fromarray(noise()).save(tmp_path / 'a.png')
  os.rename(tmp_path / 'a.png', path)
  name = os.fsdecode(path)
  np.testing.assert_array_equal(read(name), noise())
  assert decode.printable(name).endswith('caf\\xe9.png')
  assert decode.printable('a\nb\x1b[1mé') == 'a\\x0ab\\x1b[1mé'

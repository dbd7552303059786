"""The pictures and the page of maps: one picture per layer, nothing from outside, colours that can be read back."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from fastlm.data.tokenizers.byte_level import ByteTokenizer
from fastlm.errors import UserError
from fastlm.measurement.attention_maps import AttentionMap, Looked
from fastlm.reports import attention_figures, attention_maps, attention_page
from fastlm.reports.token_names import token_names

TOKENS = ["</script>", "$x_1$", "·<b>", "中", "↵"]


def looked(notice=""):
    rng, size = np.random.default_rng(0), len(TOKENS)
    shares = np.tril(rng.uniform(size=(2, size, size)))
    shares /= shares.sum(-1, keepdims=True)
    about = {"causal": True, "queries": "tokens", "keys": "tokens"}
    maps = [
        AttentionMap("decoder", 0, "full", weights=shares.astype(np.float32), **about),
        AttentionMap("decoder", 1, "gated_delta", weights=np.tril(rng.normal(size=(3, size, size))), **about),
    ]
    return Looked("Attention of <a run>", {"tokens": TOKENS}, maps, notice)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps") / "new"
    attention_maps.write(looked("The text is cut."), folder)
    return folder


def test_one_picture_per_layer(folder):
    names = {"attention.html", "attention.json", "overview.png", "decoder_00.png", "decoder_01.png"}
    assert {path.name for path in folder.iterdir()} == names
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            assert picture.width > 300
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_the_page_needs_nothing_else(folder):
    page = (folder / "attention.html").read_text()
    assert "http" not in page and "@import" not in page and "url(" not in page
    assert all(address.startswith(("data:", "#")) for address in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert page.count('<img class="map"') == 5
    assert page.count("</script>") == 1 and "<a run>" not in page and "&lt;a run&gt;" in page
    assert "The text is cut." in page
    assert "Weights of gated_delta are no shares of 1, and may be negative" in page
    data = json.loads(re.search(r"const DATA = (.*);\n", page).group(1))
    assert data["tokens"]["tokens"] == TOKENS


def test_weights_are_read_back_from_the_colours():
    maps = looked().maps
    for one, scale in zip(maps, attention_figures.scales(maps)):
        colors = attention_page.palette(scale)
        address = attention_page.picture(attention_figures.visible(one)[0], scale, colors)
        levels = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))
        hidden = np.triu(np.ones(levels.shape, bool), 1)
        assert np.all(levels[hidden] == attention_page.UNSEEN)
        root = levels[~hidden] / attention_page.SHOWN
        root = 2 * root - 1 if scale.signed else root
        np.testing.assert_allclose(np.sign(root) * root**2 * scale.top, one.weights[0][~hidden], atol=0.02 * scale.top)
        assert len({tuple(color) for color in colors.tolist()}) > 250


def test_one_scale_for_weights_of_a_kind():
    first, second = attention_figures.scales(looked().maps)
    assert (first.top, first.signed, second.signed) == (1.0, False, True)
    assert first.levels(np.array([0.0, 0.25, 1.0])).tolist() == [0.0, 0.5, 1.0]
    assert second.levels(np.array([-second.top, 0.0, second.top])).tolist() == [0.0, 0.5, 1.0]


def test_numbers_are_json(folder):
    stored = json.loads((folder / "attention.json").read_text())
    (first, second), maps = stored["maps"], looked().maps
    assert (first["signed"], second["signed"]) == (False, True)
    np.testing.assert_allclose(first["entropy"], maps[0].entropy, atol=1e-5)
    np.testing.assert_allclose(first["effective_tokens"], np.exp(maps[0].entropy), atol=1e-5)
    assert stored["notice"] == "The text is cut."
    assert attention_maps._plain(np.array([np.nan, 1.0])) == [None, 1.0]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: could not be written \(File exists\); name another with --maps_folder"):
        attention_maps.write(looked(), tmp_path / "file")


def test_names_of_tokens():
    tokenizer = ByteTokenizer()
    names = token_names(tokenizer, [*tokenizer.encode("a\n é"), tokenizer.eos, 257, 999])
    assert names == ["a", "↵", "·", "\\xc3", "\\xa9", "<start|end>", "<mask>", "<999>"]

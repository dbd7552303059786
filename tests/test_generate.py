"""`python -m fastlm.generate` on models of each family: chats, sources, beams; and what training on keeps of them."""

import json

import jax
import pytest
from tokenizers import Tokenizer

from fastlm.data import chat
from fastlm.decoding import beam, inputs
from fastlm.parallel import mesh as meshes
from fastlm.training import build, restore
from tests.entry_points import call, refuses
from tests.models.huggingface_folders import ROBERTA, copied, with_tokenizer

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}a"


@pytest.fixture(autouse=True)
def leave_no_mesh(no_mesh):
    pass


def converted(case, path, post_processor=None, **configuration):
    folder = with_tokenizer(copied(case, path / case), configuration, post_processor)
    outcome = call("convert", "--from", folder, "--to", path / "run")
    assert outcome.status == 0, outcome.err
    return path / "run"


def said(workdir, *arguments):
    outcome = call("generate", "--workdir", workdir, "--temperature", "0", "--max_tokens", "5", *arguments)
    assert outcome.status == 0, outcome.err
    return outcome.out


def test_a_chat_is_its_template_continued(tmp_path):
    workdir = converted("llama", tmp_path, chat_template=TEMPLATE)
    answer = said(workdir, "--chat", "--system", "be good", "--prompt", "cab")
    restored = restore.restore(workdir, meshes.make())
    tokenizer = restored.tokenizer
    ids = tokenizer.encode_marked("<s>be good</s>cab</s>a")
    assert [int(i) for i in ids if i in (1, 2)] == [1, 2, 2], "markers are special tokens"
    (best,) = beam.search(restored.model, restored.params, [ids], max_tokens=5, beams=1, end=tokenizer.eos)[0]
    assert answer == tokenizer.decode(best.tokens) + "\n"
    assert 1 not in tokenizer.encode("<s>"), "and text is text"


def test_chats_that_cannot_be(tmp_path):
    workdir = converted("llama", tmp_path, chat_template="{{ raise_exception('no system') }}")
    chat = ["generate", "--workdir", workdir, "--chat", "--prompt"]
    refuses("the chat template refuses these messages: no system", *chat, "a")
    refuses("the prompt is not valid UTF-8", *chat, "a\udcff")
    told = [*chat, "a", "--beams", "2"]
    about = workdir / "checkpoints" / "0" / "about" / "metadata"
    stored = json.loads(about.read_text())
    stored["huggingface"] |= {"generation": {"eos_token_id": [2, 3]}, "chat_template": TEMPLATE}
    about.write_text(json.dumps(stored))
    refuses("--beams: any of 2 tokens ends a turn", *told)
    refuses("a message spells '</s>', with which the template marks turns", *chat, "a</s>b")
    for template, message in {
        "{% if %}": "chat template is broken at line 1",
        "{{ messages[9].content.x }}": "chat template fails on these messages (UndefinedError",
        "{{ ''.__class__.__mro__ }}": "chat template fails on these messages (SecurityError",
        None: "came without a chat template",
    }.items():
        stored["huggingface"]["chat_template"] = template
        about.write_text(json.dumps(stored))
        refuses(message, *chat, "a")


@pytest.mark.parametrize("case", ["t5", "marian"])
def test_how_a_model_from_elsewhere_begins_and_what_it_may_write(case, tmp_path):
    restored = restore.restore(converted(case, tmp_path, pad_token="<unk>"), meshes.make())
    came, task = restored.about["huggingface"]["generation"], restored.about["config"]["task"]
    assert (task["start"], task["forced_first"]) == (came["decoder_start_token_id"], -1)
    assert task["forbidden"] == [came["pad_token_id"]]


@pytest.mark.slow
def test_an_encoder_decoder_writes_what_it_is_asked_to(tmp_path):
    workdir = converted("bart", tmp_path, ROBERTA, pad_token="<unk>")
    restored = restore.restore(workdir, meshes.make())
    came, task = restored.about["huggingface"]["generation"], restored.about["config"]["task"]
    assert task["start"] == came["decoder_start_token_id"] and task["forbidden"] == [came["pad_token_id"]]
    assert task["forced_first"] == came.get("forced_bos_token_id", -1)
    ids = Tokenizer.from_file(str(workdir / "tokenizer" / "tokenizer.json")).encode("abc").ids
    assert (ids[0], ids[-1]) == (1, 2)
    rules = {"start": task["start"], "forbidden": task["forbidden"], "end": restored.tokenizer.eos}
    rules |= {"forced_first": came["forced_bos_token_id"]} if "forced_bos_token_id" in came else {}
    (found,) = beam.search(restored.model, restored.params, [ids], max_tokens=5, beams=3, n_best=2, **rules)
    lines = said(workdir, "--prompt", "abc", "--beams", "3", "--n_best", "2").splitlines()
    assert lines == [f"{h.score:.3f}  {restored.tokenizer.decode(h.tokens)}" for h in found]
    batch = said(workdir, "--prompt", "abc", "--prompt", "c", "--beams", "3").split("---")
    assert len(batch) == 3 and batch[1].split("\n")[1] == lines[0].split("  ", 1)[1]
    (greedy,) = beam.search(restored.model, restored.params, [ids], max_tokens=5, beams=1, **rules)
    assert said(workdir, "--prompt", "abc") == restored.tokenizer.decode(greedy[0].tokens) + "\n"
    assert greedy[0].tokens and restored.tokenizer.decode(greedy[0].tokens)
    assert said(workdir, "--prompt", "abc", "--prompt", "abc").count(restored.tokenizer.decode(greedy[0].tokens)) == 2
    refuses("the prompt is not valid UTF-8", "generate", "--workdir", workdir, "--prompt", "a\udcff")


def test_what_is_fine_tuned_begins_with_the_tokens_that_the_model_came_with(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda *a: 1)
    monkeypatch.setattr(jax, "devices", lambda *a, _all=jax.devices: _all(*a)[:1])
    workdir = converted("bart", tmp_path, pad_token="<unk>")
    came = restore.restore(workdir, meshes.make()).about["config"]["task"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"a": "abc", "b": "cab", "split": s}) + "\n" for s in ("train", "test") * 8))
    tiny_config |= {"init": {"source": str(workdir), "step": ""}, "model": {}}
    tiny_config["data"] |= {"sources": ((f"jsonl:{rows}", 1.0),), "length": 16}
    tiny_config["evaluation"] |= {"split": "test", "final_split": ""}
    tiny_config["task"] = {"name": "sequence_to_sequence", "source": "a", "target": "b"}
    kind = build.build(tiny_config, tmp_path / "tuned").kind
    assert (kind.start, kind.forbidden) == (came["start"], tuple(came["forbidden"])) and came["forbidden"]
    tiny_config["task"] |= {"start": 1, "forbidden": (2,)}
    other = build.build(tiny_config, tmp_path / "other").kind
    assert (other.start, other.forbidden) == (1, (2,))


def test_padding_that_is_the_end_is_not_forbidden(tmp_path):
    workdir = converted("bart", tmp_path)
    restored = restore.restore(workdir, meshes.make())
    task = restored.about["config"]["task"]
    assert restored.tokenizer.pad == restored.tokenizer.eos not in task["forbidden"]


def test_names_and_tags_that_templates_of_hugging_face_use():
    template = "{% if tools is not none %}T{% endif %}{% generation %}{{ messages | tojson }}{% endgeneration %}"
    assert chat.render(template, [{"role": "user", "content": "<é>"}], {}) == '[{"role": "user", "content": "<é>"}]'


def test_models_that_write_nothing(tmp_path):
    workdir = converted("bert_spans", tmp_path)
    refuses("a model of this task writes no text", "generate", "--workdir", workdir, "--prompt", "a")


@pytest.mark.slow
def test_a_draft_changes_the_readings_and_not_the_text(tmp_path):
    workdir = converted("llama", tmp_path)
    plain = said(workdir, "--prompt", "abab")
    batch = said(workdir, "--prompt", "abab", "--prompt", "c")
    for draft in ("lookup", workdir):
        outcome = call(
            *("generate", "--workdir", workdir, "--temperature", "0", "--max_tokens", "5", "--prompt", "abab"),
            *("--draft", draft, "--span", "2"),
        )
        assert (outcome.status, outcome.out) == (0, plain)
        assert f"draft {draft}: " in outcome.err and "tokens a reading, of at most 3" in outcome.err
        assert said(workdir, "--prompt", "abab", "--prompt", "c", "--draft", draft) == batch
    other = converted("llama", tmp_path / "other", ROBERTA)
    ask = ["generate", "--workdir", workdir, "--prompt", "abc", "--draft"]
    refuses("has another tokenizer than", *ask, other)
    refuses("--draft: a search with --beams takes none", *ask, "lookup", "--beams", "2")
    refuses("no checkpoint", *ask, tmp_path)


@pytest.mark.slow
def test_more_prompts_than_rows_wait_and_get_the_same_texts(tmp_path, monkeypatch):
    workdir = converted("llama", tmp_path)
    asked = ["generate", "--workdir", workdir, "--max_tokens", "5", "--temperature", "1", "--seed", "3"]
    prompts = [word for text in ("ab", "c", "ab", "abc", "cab") for word in ("--prompt", text)]
    read, make = [], inputs.make
    monkeypatch.setattr(inputs, "make", lambda cfg, rows, *more: read.append(len(rows)) or make(cfg, rows, *more))
    for how in (["--beams", "2"], ["--draft", "lookup"], []):
        together = call(*asked, *prompts, *how)
        read.clear()
        waiting = call(*asked, *prompts, *how, "--rows", "2")
        assert together.status == 0 and waiting.out == together.out and waiting.out.count("--- ") == 5
        assert not how or read == [5, 2, 2, 1]  # all are looked at, before any is written to
        late = call(*asked, "--prompt", "a", "--prompt", "a" * 999, *how, "--rows", "1")
        assert late.status == 2 and not late.out and "the model's context is" in late.err


def test_a_stop_ends_the_text_and_is_not_shown(tmp_path):
    workdir = converted("llama", tmp_path)
    more = ["--max_tokens", "24", "--prompt", "abab"]
    written = said(workdir, *more).removeprefix("abab").removesuffix("\n")
    assert len(written) > 6
    stop = written[4:6]
    wanted = "abab" + written[: written.index(stop)]
    assert said(workdir, *more, "--stop", "nowhere", "--stop", stop) == wanted + "\n"
    both = said(workdir, *more, "--prompt", "c", "--stop", stop, "--rows", "1", "--log_probabilities")
    first, second = both.split("--- ")[1:]
    assert first.startswith(f"'abab'\n{wanted}\nlog-probability -") and second.startswith("'c'\nc")
    refuses("--log_probabilities: are not kept with --draft", *asked_of(workdir), "--draft", "lookup")
    refuses("--log_probabilities: a search with --beams takes none", *asked_of(workdir), "--beams", "2")


def asked_of(workdir):
    return ["generate", "--workdir", workdir, "--prompt", "a", "--log_probabilities"]


def test_devices_that_share_each_weight_write_the_same(tmp_path):
    workdir = converted("llama", tmp_path)
    plain = said(workdir, "--prompt", "abab")
    assert said(workdir, "--prompt", "abab", "--tensor", "2") == plain
    message = "--tensor 3: does not divide the 8 devices"
    refuses(message, "generate", "--workdir", workdir, "--prompt", "a", "--tensor", "3")

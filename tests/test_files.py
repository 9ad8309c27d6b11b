"""Files are there whole or not at all, whoever writes them at once and whatever interrupts it."""

import multiprocessing
import os
import stat
import threading

import pytest
from tiny_latents import mixture
from tiny_nvib import tiny_nvib

import nvib_hf.files
from nvib_hf import NvibLatents, add_to_model_card
from nvib_hf.files import write_whole
from nvib_hf.wrapping.hub import save_code


def test_text_and_bytes(tmp_path):
    write_whole(tmp_path / "text", "Zürich\n")
    write_whole(tmp_path / "bytes", b"\x00\xff")
    assert (tmp_path / "text").read_bytes() == "Zürich\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert {path.name for path in tmp_path.iterdir()} == {"text", "bytes"}


def test_threads_that_write_one_path_leave_one_of_their_files(tmp_path):
    path, errors, unreadable = tmp_path / "latents.safetensors", [], []
    batches = [mixture(batch=size) for size in (1, 2, 3, 4)]

    def write(latents):
        try:
            for _ in range(25):
                latents.save(path)
                unreadable.append(len(NvibLatents.load(path)) not in (1, 2, 3, 4))
        except (OSError, ValueError) as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(latents,)) for latents in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(unreadable) == 100 and not any(unreadable)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(os.name == "nt", reason="files have no such mode")
def test_the_mode_of_a_file_is_kept_and_a_new_one_has_the_usual(tmp_path):
    path, usual = tmp_path / "file", tmp_path / "usual"
    usual.write_text("")
    write_whole(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)
    for mode in (0o600, 0o640, 0o444):
        path.chmod(mode)
        write_whole(path, "again")
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.write_text("untouched")
    (tmp_path / "file").symlink_to(other)
    write_whole(tmp_path / "file", "new")
    assert other.read_text() == "untouched"
    assert (tmp_path / "file").read_text() == "new" and not (tmp_path / "file").is_symlink()
    # One that was planted under the name that comes next, too: nothing is written through it.
    monkeypatch.setattr(nvib_hf.files.secrets, "token_hex", lambda size: "known")
    (tmp_path / ".file.known").symlink_to(other)
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "file", "newer")
    assert other.read_text() == "untouched" and (tmp_path / "file").read_text() == "new"


RESULTS = {"settings": {"texts": 4, "seed": 0}, "reconstruction": {"exact_match": 0.5}}


def writers(folder):
    """What writes into a folder, by the name of its file, with a good one there before."""
    (folder / "README.md").write_text("# A card\n")
    mixture().save(folder / "latents.safetensors")
    model = tiny_nvib()
    return {
        "latents.safetensors": lambda: mixture(batch=2).save(folder / "latents.safetensors"),
        "README.md": lambda: add_to_model_card(folder, RESULTS),
        "modeling_nvib.py": lambda: save_code(type(model), folder),
        "a card": lambda: model._save_card(folder, "name"),
    }


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for name, write in writers(tmp_path).items():
        file = tmp_path / {"a card": "README.md"}.get(name, name)
        before = file.read_bytes() if file.exists() else None
        with monkeypatch.context() as patch:
            patch.setattr(nvib_hf.files.os, "fdopen", full)
            with pytest.raises(OSError, match="No space left"):
                write()
        assert (file.read_bytes() if file.exists() else None) == before
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        write()
        assert file.read_bytes() != before


def rewrite(path, ready):
    ready.set()
    while True:
        for text in ("a" * 200_000, "b" * 200_000):
            write_whole(path, text)


@pytest.mark.skipif(os.name == "nt", reason="it has no such signal")
def test_a_process_that_is_killed_leaves_a_whole_file(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "a" * 200_000)
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        ready = context.Event()
        process = context.Process(target=rewrite, args=(path, ready))
        process.start()
        ready.wait(60)
        process.join(0.02)
        process.kill()
        process.join(60)
        text = path.read_text()
        assert len(text) == 200_000 and len(set(text)) == 1

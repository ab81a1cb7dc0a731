"""Make the page of the documents' site that runs the built-in model: the example of README.md in the visitor's browser.

    python -m tools.live_page build/live

It trains pocket, exports it with `merge --to onnx`, and adds transformers.js and onnxruntime's wasm module, which npm
downloads. If npm can't, it says so in a line, and the site has no such page.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from t5tune.checkpoints.model_card import TRANSFORMERS_JS

# package -> its files, with their SHA-256; transformers.js names the release of onnxruntime-web
PACKAGES = {
    f"@huggingface/transformers@{TRANSFORMERS_JS}": {
        "transformers.min.js": "8b5a3171f8876bab2b1820a7d65eb87628e3d30bb5ea85b9dd398e76eb34decb",
    },
    "onnxruntime-web@1.31.0-dev.20260914-8d85527a0": {
        "ort-wasm-simd-threaded.mjs": "c57ca56328877353a575e51bbca6f18450027d6c9bf2307a2cb2c41363b4de9f",
        "ort-wasm-simd-threaded.wasm": "06ba057753da3847e4c24f02d91ab133455b0817c69a44993a9a53a2146df9e3",
    },
}  # fmt: skip
ABOUT = """<p><code>pocket</code>, the T5 that comes with t5tune, learned in minutes to write orders as JSON.
<a href="../small.html#a-model-in-a-browser">How this page was made</a></p>
"""
ORDER = "Could you bring six coffees and six teas to Aida?"
# of the exported page -> of the site's
CHANGES = {
    "<title>t5tune</title>": "<title>Order six coffees - t5tune</title>",
    "<h1>Ask the model</h1>\n": f"<h1>Order six coffees</h1>\n{ABOUT}",
    "autofocus></textarea>": f"autofocus>{ORDER}</textarea>",
}


def main(folder: Path) -> None:
    """Write the page to `folder`, unless it is there.

    Raises:
        SystemExit: a downloaded file has a different hash.
    """
    if folder.is_dir():
        return
    with tempfile.TemporaryDirectory() as scratch:
        run, web = Path(scratch, "run"), Path(scratch, "web")
        try:
            scripts = download_scripts(Path(scratch))
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"the site gets no live page, because npm can't download transformers.js: {error}", file=sys.stderr)
            return
        run_t5tune("train", "--config", "pocket", "--output-dir", run)
        run_t5tune("merge", run, "--to", "onnx", "--quantization", "int8", "--output-dir", web)
        (web / "README.md").unlink()  # the site would make a page of it, which replaces index.html
        (web / "js").mkdir()
        for name, content in scripts.items():
            (web / "js" / name).write_bytes(content)
        page = (web / "index.html").read_text(encoding="utf-8")
        for old, new in CHANGES.items():
            assert old in page, old
            page = page.replace(old, new)
        (web / "index.html").write_text(page, encoding="utf-8")
        shutil.copytree(web, folder)


def run_t5tune(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "t5tune", *words], check=True)


def download_scripts(scratch: Path) -> dict[str, bytes]:
    """Download the scripts with npm, and check their hashes.

    Raises:
        OSError, CalledProcessError: npm isn't installed, or can't download a package.
    """
    found = {}
    for package, hashes in PACKAGES.items():
        command = ["npm", "pack", "--silent", "--ignore-scripts", package]
        name = subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True).stdout.strip()
        with tarfile.open(scratch / name) as archive:
            for name, expected in hashes.items():
                file = archive.extractfile(f"package/dist/{name}")
                assert file is not None, name
                found[name] = file.read()
                if (digest := hashlib.sha256(found[name]).hexdigest()) != expected:
                    sys.exit(f"{package}: {name}: its SHA-256 is {digest}, not {expected}")
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))

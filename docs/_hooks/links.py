"""What the site makes of pages that are also read as files of the repository.

A page may link to a file beyond ``docs/`` (``../examples/generate.py``): a copy of it becomes a
page of the site, and the link leads there. What docstrings write as Sphinx roles is shown as code.
"""

import logging
import re
from pathlib import Path

from mkdocs.structure.files import File

LOG = logging.getLogger(f"mkdocs.plugins.{__name__}")
ROOT = Path(__file__).resolve().parent.parent.parent
OUTWARD = re.compile(r"\]\(\.\./([^)#\s]+)")
ROLE = re.compile(r":(?:class|func|meth|mod|attr):(?=<code)")
# What has a page of its own.
PAGES = {"README.md": "index.md"}


def on_files(files, config):
    targets = set()
    for page in files.documentation_pages():
        targets |= set(OUTWARD.findall(page.content_string))
    for target in sorted(targets - set(PAGES)):
        if not (ROOT / target).is_file():
            LOG.warning("a page links to ../%s, which is no file", target)
            continue
        files.append(File.generated(config, _copy(target), content=_shown(ROOT / target)))
    return files


def on_page_markdown(markdown, page, config, files):
    return OUTWARD.sub(lambda m: f"]({PAGES.get(m[1]) or _copy(m[1])}", markdown)


def on_page_content(html, page, config, files):
    return ROLE.sub("", html)


def _copy(target):
    return f"repository/{target}" if target.endswith(".md") else f"repository/{target}.md"


def _shown(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    return f"# {path.name}\n\n```{path.suffix[1:]}\n{text}```\n"

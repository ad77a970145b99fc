"""Whether a checkpoint's chat template begins thoughts: the files that may hold it, and templates that do."""

import json

import pytest
from chat_helpers import CHAT_TEMPLATE, QWEN3_TEMPLATE, THINKING_TEMPLATE

from mmsr.chat import OPENED, UNTHOUGHT
from mmsr.pretrained.chat_template import begins_thoughts
from mmsr.setup.policy import turn_start
from mmsr.system.errors import UserError

# Qwen3 (text): where it is told not to think it writes thoughts of nothing, else nothing.
HYBRID = QWEN3_TEMPLATE.removesuffix("{%- endif %}") + (
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
TEMPLATES = {"qwen2.5": CHAT_TEMPLATE, "qwen3": QWEN3_TEMPLATE, "thinking": THINKING_TEMPLATE, "hybrid": HYBRID}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_template_that_begins_thoughts_is_not_recognised_or_another_is(file, name, tmp_path):
    """The measure: the template itself, rendered by transformers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = TEMPLATES[name]
    whole = template if file.endswith(".jinja") else json.dumps({"chat_template": template})
    (tmp_path / file).write_text(whole)
    ((shown,), _) = render_jinja_template(
        conversations=[[{"role": "user", "content": "hello"}]], chat_template=template, add_generation_prompt=True
    )
    begins = shown.endswith("<think>\n")
    assert begins_thoughts(tmp_path) == begins == (name == "thinking")
    assert turn_start("auto", tmp_path) == (OPENED if begins else "")
    assert turn_start("on", tmp_path) == OPENED
    assert turn_start("off", tmp_path) == (UNTHOUGHT if begins else "")


def test_one_of_several_templates_is_not_the_usual_one(tmp_path):
    several = [{"name": "tool_use", "template": THINKING_TEMPLATE}, {"name": "default", "template": QWEN3_TEMPLATE}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert not begins_thoughts(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(THINKING_TEMPLATE)
    assert begins_thoughts(tmp_path), "a file of its own comes first, as in transformers"


def test_a_folder_without_a_template_or_with_a_broken_file_gives_a_traceback(tmp_path):
    assert not begins_thoughts(tmp_path)
    for content in ("{}", '{"chat_template": 3}', '{"chat_template": [3, {"name": "default"}, {"name": [1]}]}'):
        (tmp_path / "tokenizer_config.json").write_text(content)
        assert not begins_thoughts(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json is not valid JSON"):
        begins_thoughts(tmp_path)

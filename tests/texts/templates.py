"""Chat templates in the forms of four families, in our words: what a template of each does with
roles, reasoning, tools and the prompt for an answer."""

KIMI = """
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}<|im_user|>{{ m.name or 'user' }}
{%- elif m.role == 'assistant' -%}<|im_assistant|>assistant
{%- else -%}<|im_system|>{{ m.name or m.role }}{%- endif -%}
<|im_middle|>
{%- if m.role == 'assistant' -%}
<think>{{ m.reasoning_content or '' if loop.last or preserve_thinking else '' }}</think>
{%- endif -%}
{%- if m.role == 'tool' -%}## Return of {{ m.tool_call_id }}\n{% endif -%}
{%- if m.content is string -%}{{ m.content }}{%- endif -%}
{%- for call in m.tool_calls or [] -%}
<|tool_call_begin|>{{ call['id'] }}<|tool_call_argument_begin|>
{%- if call.function.arguments is string -%}{{ call.function.arguments }}
{%- else -%}{{ call.function.arguments | tojson }}{%- endif -%}
<|tool_call_end|>
{%- endfor -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|><think>{%- endif -%}
"""

KIMI_THINKING = """
{%- set last = namespace(answer=-1) -%}
{%- for m in messages if m.role == 'assistant' and not m.tool_calls -%}
{%- set last.answer = messages.index(m) -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}<|im_user|>user
{%- elif m.role == 'assistant' -%}<|im_assistant|>assistant
{%- else -%}<|im_system|>{{ m.role }}{%- endif -%}
<|im_middle|>
{%- if m.role == 'assistant' and loop.index0 <= last.answer -%}<think></think>
{%- elif m.role == 'assistant' -%}<think>{{ m.reasoning_content or '' }}</think>{%- endif -%}
{%- if m.content is string -%}{{ m.content }}{%- endif -%}
{%- for call in m.tool_calls or [] -%}<|tool_call_begin|>{{ call['id'] }}<|tool_call_end|>
{%- endfor -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|><think>{%- endif -%}
"""
"""All up to the last answer is history, whose reasoning goes; calls after it keep theirs. So a chat
that ends with an answer has none."""

QWEN3 = """
{%- if tools %}<|im_start|>system\n<tools>{{ tools | tojson }}</tools><|im_end|>\n{% endif -%}
{%- set last = namespace(user=-1) -%}
{%- for m in messages if m.role == 'user' %}{% set last.user = loop.index0 %}{% endfor -%}
{%- for m in messages -%}
{%- if m.role in ('user', 'system') -%}
<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n
{%- elif m.role == 'assistant' -%}
<|im_start|>assistant\n
{%- if m.reasoning_content and loop.last -%}
<think>\n{{ m.reasoning_content }}\n</think>\n\n
{%- endif -%}
{{ m.content if m.content is string else '' }}
{%- for call in m.tool_calls or [] %}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{
 call.function.arguments if call.function.arguments is string
 else call.function.arguments | tojson }}}</tool_call>
{%- endfor -%}
<|im_end|>\n
{%- elif m.role == 'tool' -%}
<|im_start|>user\n<tool_response>{{ m.content }}</tool_response><|im_end|>\n
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}
"""

DEEPSEEK = """
{{- bos_token -}}
{%- for m in messages if m.role == 'system' %}{{ m.content }}{% endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}<|User|>{{ m.content }}
{%- elif m.role == 'assistant' and m.tool_calls -%}<|Assistant|>{{ m.content or '' }}
{%- for call in m.tool_calls -%}
{{ '<|call|>' + call.function.name + '<|sep|>' + call.function.arguments + '<|end|>' }}
{%- endfor -%}{{ eos_token }}
{%- elif m.role == 'assistant' -%}<|Assistant|></think>{{ m.content }}{{ eos_token }}
{%- elif m.role == 'tool' -%}<|output|>{{ m.content }}<|/output|>
{%- elif m.role != 'system' -%}{{ raise_exception('no role ' + m.role) }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|Assistant|><think>{%- endif -%}
"""

GLM = """[gMASK]<sop>
{%- if tools %}<|system|>\n{% for tool in tools %}{{ tool.function.name }}\n{% endfor %}{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}<|user|>\n{{ m.content }}
{%- elif m.role == 'assistant' -%}<|assistant|>
{%- if m.reasoning_content and (loop.last or clear_thinking is false) %}
<think>{{ m.reasoning_content }}</think>
{%- else %}\n<think></think>{% endif -%}
{%- if m.content %}\n{{ m.content }}{% endif -%}
{%- for call in m.tool_calls or [] %}
<tool_call>{{ call.function.name }}
{%- for k, v in call.function.arguments.items() -%}
<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value>
{%- endfor -%}</tool_call>
{%- endfor -%}
{%- elif m.role in ('tool', 'critic') -%}<|observation|>\n{{ m.content }}
{%- elif m.role == 'system' -%}<|system|>\n{{ m.content }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|><think>{%- endif -%}
"""

CALLS_WITHOUT_CONTENT = DEEPSEEK.replace(
    "m.role == 'assistant' and m.tool_calls", "m.role == 'assistant' and m.content is none"
)
"""An older form, which knows calls by the content that is not there."""

TEMPLATES = {"kimi": KIMI, "qwen3": QWEN3, "deepseek": DEEPSEEK, "glm": GLM}

"""Networks of ours and of other libraries are traced whole, with an account that adds up."""

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.explain.relevance import relevance

TIMM = {
    "vit_tiny_patch16_224": 224,
    "resnet18": 64,
    "convnext_atto": 64,
    "swin_tiny_patch4_window7_224": 224,
    "maxvit_nano_rw_256": 256,
}


def check_traced(model, *inputs, **options):
    """No operation is unknown, and what the map lacks of the logit stands in the ledger."""
    found = relevance(model.eval(), *inputs, recipe="gamma", **options)
    assert found.unknown == {}
    assert found.start.abs().min() > 0
    taken = sum(each.amount for each in found.absorbed)
    scale = max(1.0, *(abs(each.amount) for each in found.absorbed))
    assert_close(found.error.sum().item(), -taken, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("name", saccade.list_models("*_test"))
def test_networks_of_ours(name):
    torch.manual_seed(0)
    check_traced(saccade.create_model(name), torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm(name):
    timm = pytest.importorskip("timm", exc_type=ImportError, reason="timm is not installed, or torchvision is not")
    torch.manual_seed(0)
    check_traced(timm.create_model(name, num_classes=10), torch.randn(1, 3, TIMM[name], TIMM[name]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["vit", "bert", "gpt2", "llama"])
def test_networks_of_transformers(kind, attention):
    hf = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    size |= {"attn_implementation": attention}
    tokens, logits = torch.randint(0, 100, (2, 12)), lambda returned: returned.logits
    if kind == "vit":
        model = hf.ViTForImageClassification(hf.ViTConfig(**size, image_size=64, num_labels=10))
        check_traced(model, torch.randn(2, 3, 64, 64), output=logits)
    elif kind == "bert":
        model = hf.BertForSequenceClassification(hf.BertConfig(**size, vocab_size=100, num_labels=3))
        check_traced(model, tokens, output=logits)
    else:
        config = hf.GPT2Config if kind == "gpt2" else hf.LlamaConfig
        shared = {} if kind == "gpt2" else {"num_key_value_heads": 2}
        model = (hf.GPT2LMHeadModel if kind == "gpt2" else hf.LlamaForCausalLM)(
            config(**size, **shared, vocab_size=100, bos_token_id=None, eos_token_id=None)
        )
        check_traced(model, tokens, output=lambda returned: returned.logits[:, -1])

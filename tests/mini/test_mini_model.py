"""The mini model: that it loads as any model does, has learned its domains, and uses all of its experts."""

import json
from collections import defaultdict

import numpy as np
import pytest
import zstandard

from moescope.mini import corpus_path, model_path

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DOCUMENTS_PER_DOMAIN = 5


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(model_path()).eval()


@pytest.fixture(scope="module")
def ids_of_domains():
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path())
    domains = defaultdict(list)
    packed = corpus_path().read_bytes()
    for line in zstandard.ZstdDecompressor().decompressobj().decompress(packed).decode("utf-8").splitlines():
        document = json.loads(line)
        domains[document["meta"]["pile_set_name"]].append(torch.tensor(tokenizer(document["text"])["input_ids"]))
    return domains


@pytest.fixture(scope="module")
def results(model, ids_of_domains):
    """Nats a token of each domain, and the loads (layer, expert), over a few documents of each domain."""
    shape = model.config.num_hidden_layers, model.config.num_local_experts
    losses, loads = {}, np.zeros(shape, np.int64)

    def count(layer, output):
        loads[layer] += np.bincount(output[2].flatten().numpy(), minlength=shape[1])

    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output, index=index: count(index, output))
        for index, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for domain, documents in ids_of_domains.items():
            nats = tokens = 0
            for ids in documents[:DOCUMENTS_PER_DOMAIN]:
                logits = model(ids[None]).logits[0, :-1].float()
                nats += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
                tokens += len(ids) - 1
            losses[domain] = nats / tokens
    for hook in hooks:
        hook.remove()
    return losses, loads


def test_the_files_stay_small_and_the_weights_are_bfloat16(model):
    assert model.dtype == torch.bfloat16
    assert sum(path.stat().st_size for path in model_path().iterdir()) < 32_000_000
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (8, 2)


def test_the_loss_is_far_below_a_unigram_models_in_each_domain(results, ids_of_domains):
    losses, _ = results
    for domain, documents in ids_of_domains.items():
        # The entropy of the sample's own token counts: no unigram model can do better on these very documents.
        counts = torch.bincount(torch.cat([ids[1:] for ids in documents])).double()
        entropy = torch.distributions.Categorical(counts).entropy().item()
        assert losses[domain] < 0.8 * entropy, (domain, losses[domain], entropy)


def test_every_expert_of_every_layer_is_used(results):
    _, loads = results
    assert loads.min() > 0.01 * loads.sum(axis=1).min()


def test_no_layers_largest_load_is_twice_its_mean(results):
    _, loads = results
    assert (loads.max(axis=1) / loads.mean(axis=1)).max() < 2


def test_the_recorded_evaluation_is_healthy_and_stands_in_the_card():
    figures = json.loads((model_path() / "evaluation.json").read_text(encoding="utf-8"))
    card = (model_path() / "README.md").read_text(encoding="utf-8")
    assert max(figures["sample_load"]["imbalance"]) < 2
    assert min(map(min, figures["sample_load"]["shares"])) > 0
    for domain, losses in {**figures["held_out"], **figures["sample"]}.items():
        assert losses["nats_per_token"] < 0.8 * losses["unigram_nats_per_token"], domain
        assert f"| {domain} |" in card
    assert f"{figures['training']['steps']:,} steps" in card

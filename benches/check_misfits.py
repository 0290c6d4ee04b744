"""Mistakes that a person may type, no two alike: what `zoo bench check` asks the check about.

Each is a line of words as behind `zoo check`, and words that the refusal has to hold: the part or option, and what is
wrong with it. `{at}` is a folder of checkpoints without weights (`write_checkpoints`), `own_*` are parts of
`zoo.benches.check_parts`.
"""

import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class Misfit:
    """A mistake, as it is typed, and what its refusal must say."""

    words: tuple[str, ...]
    says: tuple[str, ...]


# What everything but the mistake is, where the default model will not do.
_TOWER = "vision=timm vision.width=32 vision.heads=2 vision.depth=2 vision.image_size=32 vision.patch_size=8"
_HF = "vision=hf vision.width=32 vision.heads=2 vision.depth=2 vision.image_size=32 vision.patch_size=8"
_CLIP = "vision=open_clip vision.width=32 vision.heads=2 vision.depth=2 vision.image_size=32 vision.patch_size=8"
_MOE = "llm=hf llm.model_type=mixtral llm.num_experts=4 llm.top_k=2 llm.zero_init_residual=false"
_OSS = "llm.model_type=gpt_oss llm.num_experts=4 llm.top_k=2 llm.zero_init_residual=false"
_OWN = "plugins=[zoo.benches.check_parts]"

# words | what the refusal says, separated by semicolons
_LINES = f"""
vision.image_size=65 | image_size; 65
vision.patch_size=0 | vision; patch_size
vision.patch_size=-8 | vision; patch_size
vision.width=-128 | vision; width
vision.heads=0 | vision; heads
vision.heads=3 | vision; width; heads
vision.depth=0 | vision; depth
vision.depth=1000000 | depth; 1000000
vision.width=4000000 | width; 4000000
vision.registers=-2 | registers; -2
vision.mlp_ratio=-1 | mlp_ratio
vision.mlp_ratio=nan | mlp_ratio
vision.layer=9 | vision; layer; 9
vision.layer=-7 | vision; layer; -7
vision.activation=gleu | activation; gelu
vision.stem=cnov | stem; conv
vision.pooling_head=true | vision; pooling head
vision.resample_by=pil | resample; pillow
vision.model=vit_tiny_patch16_244 | timm; vit_tiny_patch16_224
vision.model=resnet50 | vision; resnet50
vision.model=swin_tiny_patch4_window7_224 | vision; swin
vision.checkpoint=pretrained | pretrained; model
vision=[hf,hf] | hf; two
vision=[hf,tim] | tim; timm
vision=[sem:hf,loc:timm] vision.encoders.lok.depth=2 | lok; loc
vision=[sem:hf,loc:timm] vision.encoders.loc.dept=2 | loc; depth
vision=[sem:hf,loc:timm] vision.grid=dino | dino; grid
vision=[sem:hf,loc:timm] vision.gives.cls_attention=dino | dino; cls_attention
vision=[sem:hf,loc:timm] vision.join=token | token; tokens
vision=null | vision
vision=hf vision.model_type=siglib vision.image_size=64 | siglib; siglip
vision=hf vision.image_size=64 vision.patch_size=8 vision.mean=[0.5,0.5] | mean; three
vision=hf vision.image_size=64 vision.patch_size=8 vision.model_type=dinov2 vision.mlp_ratio=2.5 | mlp_ratio; dinov2
{_HF} vision.extra={{hidden_layers:3}} | vision; hidden_layers
{_HF} vision.resample=cubic | resample; cubic
{_HF} vision.fit=stretch | fit; stretch
{_HF} vision.pooling_head=true | vision; pooling
{_HF} vision.frame_tower=true vision.model_type=siglip vision.pooling_head=true | pooling_head; frame_tower
{_HF} vision.std=[0.5,0.0,0.5] | std
{_CLIP} vision.layer=0 | vision; layer
{_CLIP} vision.model=ViT-B-31 | ViT-B-31
{_CLIP} vision.model=RN50 | vision; RN50
vision.checkpoint=./no/such/encoder | no/such/encoder
vision=hf vision.checkpoint={{at}}/llama | vision; llama
llm=null | llm
llm.hidden_size=0 | llm; hidden_size
llm.hidden_size=100 llm.num_heads=3 | hidden_size; num_heads
llm.hidden_size=9000000000 | hidden_size
llm.num_layers=-1 | num_layers; -1
llm.num_layers=200000 | num_layers; 200000
llm.num_heads=0 | num_heads
llm.num_kv_heads=3 | num_kv_heads; 3
llm.intermediate_size=-4 | intermediate_size; -4
llm.max_positions=100 | positions; 100; 128
llm.router_aux_coef=0.1 | router_aux_coef
llm.router_aux_coef=inf | router_aux_coef
llm.num_experts=4 | num_experts; starcoder2
llm.top_k=2 | top_k; starcoder2
llm.extra={{hidden_atc:relu}} | hidden_atc; hidden_act
llm.extra={{hidden_act:reluu}} | llm; reluu
llm.model_type=lama | lama; llama
llm.model_type=t5 | t5; causal
llm.model_type=bert | bert; masked
llm.model_type=roberta | roberta; masked
llm.model_type=electra | electra; masked
llm.model_type=rembert | rembert; masked
llm.model_type=bart | bart; encoder-decoder
llm.model_type=marian | marian; encoder-decoder
llm.model_type=whisper | whisper
llm.model_type=cpmant | cpmant
llm.model_type=gemma4_text llm.zero_init_residual=false | gemma4_text; hidden_size_per_layer_input
llm.model_type=gemma2 | zero_init_residual; gemma2
llm.model_type=mixtral llm.num_experts=2 llm.top_k=3 | top_k=3; num_experts=2
llm.model_type=qwen3_moe llm.num_experts=4 | top_k=8; num_experts=4
llm=hf llm.checkpoint=./no/such/llm | no/such/llm
llm=hf llm.checkpoint={{at}}/bert | bert; masked
llm=hf llm.checkpoint={{at}}/bart | bart; encoder-decoder
llm=hf llm.checkpoint={{at}}/clip | clip; causal
llm=hf llm.checkpoint={{at}}/broken | broken
llm=hf llm.checkpoint={{at}}/empty | empty
llm=hf llm.checkpoint={{at}}/pickled | pickled; safetensors
llm=hf llm.checkpoint={{at}}/short | positions; 32
llm=hf llm.checkpoint={{at}}/experts | top_k=9; num_experts=4
llm=hf llm.checkpoint={{at}}/llama llm.extra={{hidden_act:relu}} | extra; checkpoint
llm=hf llm.checkpoint={{at}}/llama tokenizer.checkpoint=./no/such/tokenizer | tokenizer; no/such
llm=hf llm.checkpoint={{at}}/llama llm.revision=../../etc | revision
llm=hf llm.checkpoint={{at}}/alone | tokenizer; alone
tokenizer.vocab_size=100 | vocab_size; 100
tokenizer.chat_template=chatlm | chatlm; chatml
projector=null | image; projector
projector=mpl | mpl; mlp
projector.depth=0 | projector; depth
projector.depth=two | depth; two
projector.hidden_size=-1 | hidden_size; -1
projector.activation=swish | activation; swish
projector=resampler projector.num_queries=0 | resampler; num_queries
projector=resampler projector.num_heads=5 | resampler; num_heads 5
projector=resampler projector.mlp_ratio=0 | mlp_ratio
projector=resampler projector.num_queries=5000 | positions
projector=pixel_shuffle projector.factor=3 | pixel_shuffle; 3; grid
projector=pixel_shuffle pruner=random | pixel_shuffle; grid; random
projector=pool projector.stride=3 | pool; stride 3
projector=pool projector.target=[9,9] | pool; target; grid
projector=pool pruner=divprune | pool; grid; divprune
pruner=randum | randum; random
pruner.keep_ratio=0.5 | pruner
pruner=random pruner.random.keep_ratio=0 | random; keep_ratio; 0
pruner=random pruner.random.seed=-1 | random; seed; -1
pruner=divprune pruner.divprune.keep_ratio=1.5 | divprune; keep_ratio; 1.5
pruner=fastervlm | fastervlm; cls_attention; timm
pruner=fastervlm pruner.fastervlm.score=probe | fastervlm; pooling_head
pruner=fastervlm pruner.fastervlm.num_keep=-3 vision.cls_token=true | num_keep; -3
pruner=visionzip | visionzip; cls_attention
pruner=visionzip pruner.visionzip.score=column_mean pruner.visionzip.targets=4 | targets; dominant
pruner=visionzip pruner.visionzip.target_ratio=1 | target_ratio
pruner=pool pruner.pool.stride=0 | pool; stride
pruner=pool pruner.pool.target=[9,9] | pool; target; grid
pruner=[random,pool] | pool; grid; random
pruner=fastv pruner.fastv.layer=0 | fastv; layer
pruner=fastv pruner.fastv.layer=40 | fastv; layer; 0 to 3
pruner=fastv llm.model_type=gpt2 | fastv; gpt2
pruner=aim pruner.aim.start=3 pruner.aim.stop=2 | aim; start; stop
pruner=aim pruner.aim.temperature=nan | aim; temperature
pruner=aim pruner.aim.stop=99 | aim; 99
pruner=fastv adapter=vlora projector=null | fastv; image_tokens; vlora
adapter=lroa | lroa; lora
adapter=lora adapter.lora.rank=0 | lora; rank
adapter=lora adapter.lora.rank=100000 | lora; rank; 100000
adapter=lora adapter.lora.alpha=nan | lora; alpha
adapter=lora adapter.lora.dropout=1 | lora; dropout
adapter=lora adapter.lora.targets=[q_prj] | lora; q_prj; q_proj
adapter=[lora,mole] | lora; mole
adapter=mole adapter.mole.layers=[7] | mole; 7
adapter=mole adapter.mole.gate=hard | mole; gate; hard
adapter=mole llm.model_type=bloom | mole; BloomMLP
adapter=mole {_OSS} | mole; GptOss
adapter=vlora projector=null {_OSS} | vlora; GptOss
adapter=moextend | moextend; moe
adapter=moextend {_MOE} adapter.moextend.layers=[9] | moextend; 9
adapter=moextend {_MOE} adapter.moextend.layers=[1] adapter.moextend.sources=[8] | moextend; 8
adapter=upcycle {_MOE} | upcycle; dense
adapter=upcycle adapter.upcycle.top_k=5 | upcycle; top_k; 5
adapter=upcycle adapter.upcycle.layers=[-2] | upcycle; -2
adapter=vlora | vlora; image_tokens
adapter=vlora projector=null adapter.vlora.skip=9 | vlora; skip
adapter=vlora projector=null adapter.vlora.types=qx | vlora; types
adapter=vlora projector=null adapter.vlora.width=30 | vlora; width 30
layout=anyres layout.pinpoints=[[64]] | pinpoints
layout=tiles layout.most=0 | most
layout=anyres layout.frames=skip | frames; skip
layout=tiles layout.most=40 | positions
layout=frames layout.cls=true | frames; prefix_tokens
attention=flash | flash; flash_attention_2
attention=flash_attention_2 device=cpu | flash_attention_2; cpu
attention=flex_attention device=cpu | flex_attention; cpu
attention=sdpa llm.model_type=gpt_oss llm.num_experts=4 llm.top_k=2 | sdpa; GptOss
device=gpu | gpu; cuda
device=mps | mps
precision=fp8 | fp8; bf16
stages.look.train=[visoin] | look; visoin; vision
stages.look.train=[adapter.lora] | look; adapter.lora
stages.look.freeze=[all] | look; nothing trains
stages.look.loss_weights.dnese=1 | look; dnese; dense
stages.relate.loss_weights.answer=-1 | relate; loss_weights; -1
stages.look.lr_scale.llm=0.1 | look; lr_scale; llm
stages.look.distiller=dence | dence; dense
stages.look.distiller={{name:dense,classes:[1]}} | look; classes
stages.look.distiller=null | look; nothing is learnt
stages.name.distiller=kl | name; kl; teacher
stages.name.teacher=scenes_tiny | name; dense; teacher
stages.look.epochs=2 | look; steps; epochs
stages.look.steps=0 | look; steps
stages.look.batch_size=10 stages.look.accumulate=3 | look; batch_size; accumulate
stages.look.warmup_ratio=2 | look; warmup_ratio
stages.look.lr=nan | look; lr
stages.look.betas=[0.9] | look; betas
stages.look.optimizer=adam | look; adamw
stages.look.detach=[lora] | look; lora
stages.look.pack_length=256 attention=flex_attention device=cpu | look; flex_attention
stages.look.pack_length=8 | look; pack_length; 8
stages.look.data.scens=1 | scens; scenes
stages.look.data.scenes_basics=0 | look; weights are 0
pruner=fastv pruner.fastv.layer=1 | name; fastv; dialogs; pack=none
pruner=fastv pruner.fastv.layer=1 stages.relate.compile=true | relate; fastv; compile
vision.patch_size=16 | look; patch_labels; 64; grid [4, 4]
data=[scenes] data.scenes.grid=0 | look; patch_labels; scenes
stages.relate.distiller=kl stages.relate.teacher={{model:scenes_tiny,bits:3}} | relate; bits; 3
llm.hidden_size=132 llm.extra={{}} | llm
projector.hidden_size=100000000000 | projector; mlp; parameters
adapter=lora adapter.lora.alpha=0 | lora; alpha
{_HF} vision.model_type=dinov3_vit vision.width=36 vision.heads=4 | vision
data=[] | no data
data=[vqa_rad] | train.jsonl
data=[scenes] data.scenes.split=eval stages.name.data={{}} | scenes
data=[scenes] data.scenes.difficulty=9 | difficulty; 9
data=[scenes] data.scenes.size=-64 | size; -64
data=[scenes] data.scenes.scenes=0 | scenes; 0
data=[chat_json] data.chat_json.file=no/such.json | no/such.json
data=[chat_json] | chat_json; file
task=[exact] task.exact.max_new_tokens=0 | max_new_tokens
task=[exat] | exat; exact
limit=-4 | limit; -4
{_OWN} pruner=own_half | own_half; 5 tokens; 32
{_OWN} pruner=own_content | own_content; of one image
{_OWN} pruner=own_wide | own_wide; wide
{_OWN} pruner=own_gridless | own_gridless; grid
{_OWN} pruner=own_raises | own_raises; IndexError
{_OWN} projector=own_short | own_short; tokens
{_OWN} projector=own_narrow | own_narrow; width
{_OWN} projector=own_unbuilt | own_unbuilt; KeyError
{_OWN} vision=own_more | own_more; tokens
{_OWN} adapter=own_needy | own_needy; moe
"""


def _parsed(line: str) -> Misfit:
    words, _, says = line.partition(" | ")
    return Misfit(tuple(shlex.split(words)), tuple(part.strip() for part in says.split(";")))


MISFITS = tuple(_parsed(line) for line in _LINES.strip().splitlines())

"""Weights that exist: where they come from, whose names they have, and how f takes them.

    load            load_encoder: any source as a timm vision transformer; the way in
    start           a pretraining's first weights, from any source
    reconstructor   a run or a MAE checkpoint with its decoder
    source          check what is named, before torch is imported
    run             what a run of ours writes and is read from
    header, files   a file of weights: its first bytes; its tensors, and the encoder among them
    foreign         an encoder that others trained, as a timm model
    layouts         what their code fixes and their files do not say
    families        every ViT of timm behind one interface
    interop         the names of MAE and Hugging Face, both ways
    mmpretrain      those of mmpretrain
    positions       position tables at another image size

Names of weights are facts: no code of other projects is used, and nothing is unpickled but
tensors and plain values.
"""

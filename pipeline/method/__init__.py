"""The formula of all methods, min E M( f(T1(x)), f(T2(x)) ): read objective.py first.

    objective           the formula, and the methods as rows of a table
    views, masking      T1 and T2: crops, jitter, and the patches that stay visible
    encoder, vit        f, with the modules of a timm ViT; its positions and initial weights
    decoder, cross_decoder   d, from visible tokens to patches
    measures/           M, one file for reconstruction and one for contrast
    heads, teacher      projector and predictor; the moving average of f
    parameter_groups    which parameters decay, and the learning rates of layers
    checks              what can be wrong with a recipe, before torch is imported
    attention           which of torch's attention kernels runs
    pictures, metrics   what a run shows of itself: predictions; CKA and a k-NN vote

Weights that exist already, whoever trained them, are in pipeline/weights.
"""

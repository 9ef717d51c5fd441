# No published number. The asymmetric loss that the public reproduction has beside the cross entropy
# of its logs, with its default gammas (--gamma_pos 0 --gamma_neg 2 --loss_clip 0 --dtgfl). It is a
# mean over images and classes, times 1000.
_base_ = "./resnet101-ida-heavy_4xb32_coco2014-448px.py"
model = dict(
    head=dict(
        loss=dict(
            _delete_=True,
            type="DetachedAsymmetricLoss",
            gamma_pos=0.0,
            gamma_neg=2.0,
            clip=0.0,
            eps=1e-5,
            loss_weight=1000 / 80,
        )
    )
)

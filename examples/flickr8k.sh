#!/bin/sh
# Train on Kaggle's Flickr8k from end to end: the folder with captions.txt and Images/.
#
#     examples/flickr8k.sh flickr8k
#     examples/flickr8k.sh flickr8k --encoder mobilenet_v2 --weights mobilenet_v2.pth    # flags of extract_features.py
#
# Writes data/kaggle/, checkpoints/kaggle/ and captions of 1,000 test photos. A stopped run continues with the same
# command. ResNet-101's features take 9 GB, and its weights are downloaded unless --weights names them.
set -eu
folder=${1:?give the folder with captions.txt and Images/}
shift

python -m preprocess data/kaggle --source "$folder" --val-share 0.125 --test-share 0.125
python extract_features.py data/kaggle --grid native "$@"
python train.py data/kaggle --run kaggle --resume
python generate.py checkpoints/kaggle --data data/kaggle --split test --json kaggle.json --html kaggle.html --scores kaggle-scores.json

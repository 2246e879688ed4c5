"""Annotations of one photo in each supported format, for attacks on their readers."""


def ai_challenger(name, captions=("a dog",)):
    return [{"image_id": name, "caption": list(captions)}]


def coco(name, captions=("a dog",)):
    return {
        "images": [{"id": 1, "file_name": name}],
        "annotations": [{"image_id": 1, "caption": caption} for caption in captions],
    }


def karpathy(name, captions=("a dog",)):
    return {"images": [{"filename": name, "split": "train", "sentences": [{"raw": caption} for caption in captions]}]}


def karpathy_folder(name, captions=("a dog",)):
    """`name` is the name of the photo's folder."""
    data = karpathy("a.jpg", captions)
    data["images"][0]["filepath"] = name
    return data


def rows(name, captions=("a dog",)):
    return [{"file_name": name, "text": caption} for caption in captions]


FORMS = {
    "rows": rows,
    "AI Challenger": ai_challenger,
    "COCO": coco,
    "Karpathy": karpathy,
    "Karpathy's folder": karpathy_folder,
}

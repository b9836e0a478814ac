"""The library, in the order the data flows: storage, images, shards, prompts, alfa, masks, scoring, engine, publish."""

"""The Hugging Face Hub.

Read in this order:
    place   a text hf://... in its parts
    store   HubStore: the files of one repository at one commit, to be read
    api     the one way to talk to the Hub, for whoever reads there and whoever publishes
"""

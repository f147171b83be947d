"""The Hugging Face Hub.

Read in this order:
    store   HubStore: the files of one repository at one commit, to be read
    api     the one way to talk to the Hub, for whoever reads there and whoever publishes
"""

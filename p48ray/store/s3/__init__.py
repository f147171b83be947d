"""Objects in a bucket, on AWS or any server that speaks S3.

Read in this order:
    store       S3Store, the operations of store.base
    api         one bucket through boto3, with one policy for errors
    multipart   objects made of parts
    compose     an object from ranges, which the server copies on its side where it can
    replies     what replies say, and whether they can be believed
"""

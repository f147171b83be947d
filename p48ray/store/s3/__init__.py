"""Objects in a bucket, on AWS or any server that speaks S3.

Read in this order:
    store       S3Store, the operations of store.base
    api         one bucket through boto3, with one policy for errors
    multipart   objects made of parts, and of ranges that the server copies on its side
"""

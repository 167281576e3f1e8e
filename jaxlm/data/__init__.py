"""From text to batches: the token store, the plan and the pipeline."""

from jaxlm.data.corpus import Corpus as Corpus
from jaxlm.data.corpus import cached_corpus as cached_corpus
from jaxlm.data.corpus import open_corpus as open_corpus
from jaxlm.data.corpus import python_library_corpus as python_library_corpus
from jaxlm.data.corpus import write_corpus as write_corpus
from jaxlm.data.pipeline import Batches as Batches
from jaxlm.data.pipeline import iterate as iterate
from jaxlm.data.plan import BucketPlan as BucketPlan
from jaxlm.data.plan import bucket as bucket
from jaxlm.data.text import Document as Document
from jaxlm.data.text import python_library as python_library
from jaxlm.data.text import text_files as text_files
from jaxlm.data.tokenizers import ByteTokenizer as ByteTokenizer
from jaxlm.data.tokenizers import Tokenizer as Tokenizer
from jaxlm.data.tokenizers import tokenizer_of as tokenizer_of

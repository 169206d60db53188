//! Checksums of blocks: what a metadata context of ours answers, so that who compares copies
//! need not move them.

use mirror::host::Errno;
use peer::structured::{put_context, put_sum, sums_bytes};
use peer::wire::SUM_BLOCK_BYTES;

use crate::io::Store;
use crate::memory::Memory;

/// After so many blocks others have a turn: the writer's requests are on the same thread.
const BLOCKS_AT_ONCE: usize = 64;

/// Reads whole blocks into the memory, and leaves in it, instead of them, the answer's payload.
pub(crate) async fn sums<D: Store>(
    store: &D,
    offset: u64,
    memory: Memory,
) -> (Result<(), Errno>, Memory) {
    let (read, mut memory) = store.read(offset, memory).await;
    if read.is_err() {
        return (read, memory);
    }
    let block_bytes = SUM_BLOCK_BYTES as usize;
    let blocks = memory.len() / block_bytes;
    for at in 0..blocks {
        if at % BLOCKS_AT_ONCE == BLOCKS_AT_ONCE - 1 {
            tokio::task::yield_now().await;
        }
        let data = memory.data_mut();
        let crc = crc32fast::hash(&data[at * block_bytes..(at + 1) * block_bytes]);
        // What is before its end has been read: a checksum takes less than its block.
        put_sum(data, at, crc);
    }
    put_context(memory.data_mut());
    memory.truncate(sums_bytes(blocks));
    (Ok(()), memory)
}

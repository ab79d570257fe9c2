//! The header of every packet (5.10.6).

/// Size of a header.
pub const HEADER: usize = 44;
/// Context id of the host (5.10.4): the other end of every connection.
pub const HOST_CID: u64 = 2;
/// `VIRTIO_VSOCK_TYPE_STREAM` (5.10.6.4), the only supported type.
pub const STREAM: u16 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender of the packet will receive no more data (5.10.6.6).
pub const NO_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender of the packet will send no more data.
pub const NO_SEND: u32 = 2;
/// Both [`NO_RECEIVE`] and [`NO_SEND`].
pub const NOTHING: u32 = NO_RECEIVE | NO_SEND;

/// Operation of a packet (5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Requests a connection.
    Request,
    /// Accepts a connection.
    Response,
    /// Reports that the connection does not exist or no longer exists.
    Reset,
    /// Ends the data in one direction or both.
    Shutdown,
    /// Carries data.
    Data,
    /// Carries only the credit information that every packet of a connection has.
    CreditUpdate,
    /// Requests a [`Op::CreditUpdate`].
    CreditRequest,
    /// Any other operation.
    Unknown(u16),
}

impl Op {
    fn from_number(number: u16) -> Self {
        match number {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Reset,
            4 => Op::Shutdown,
            5 => Op::Data,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            other => Op::Unknown(other),
        }
    }

    fn number(self) -> u16 {
        match self {
            Op::Request => 1,
            Op::Response => 2,
            Op::Reset => 3,
            Op::Shutdown => 4,
            Op::Data => 5,
            Op::CreditUpdate => 6,
            Op::CreditRequest => 7,
            Op::Unknown(other) => other,
        }
    }
}

/// `struct virtio_vsock_hdr` (5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Number of data bytes after the header.
    pub len: u32,
    /// Socket type.
    pub kind: u16,
    /// Operation.
    pub op: Op,
    /// Flags of [`Op::Shutdown`].
    pub flags: u32,
    /// Size of the sender's receive buffer in bytes (5.10.6.3).
    pub buf_alloc: u32,
    /// Number of bytes that the sender has taken out of its receive buffer since the connection began, free-running.
    pub fwd_cnt: u32,
}

impl Header {
    /// Parses a header in wire format.
    pub fn parse(bytes: &[u8; HEADER]) -> Self {
        let (words, _) = bytes.as_chunks::<4>();
        let mut words = words.iter().map(|word| u32::from_le_bytes(*word));
        // The fields are read in the order of the wire format.
        let mut word = || words.next().unwrap_or(0);
        let src_cid = u64::from(word()) | u64::from(word()) << 32;
        let dst_cid = u64::from(word()) | u64::from(word()) << 32;
        let (src_port, dst_port, len, kind_op) = (word(), word(), word(), word());
        let (kind, op) = (kind_op as u16, Op::from_number((kind_op >> 16) as u16));
        let (flags, buf_alloc, fwd_cnt) = (word(), word(), word());
        Header { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt }
    }

    /// Returns the header in wire format.
    pub fn bytes(&self) -> [u8; HEADER] {
        let Header { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt } = *self;
        let words = [
            src_cid as u32,
            (src_cid >> 32) as u32,
            dst_cid as u32,
            (dst_cid >> 32) as u32,
            src_port,
            dst_port,
            len,
            u32::from(kind) | u32::from(op.number()) << 16,
            flags,
            buf_alloc,
            fwd_cnt,
        ];
        let mut bytes = [0; HEADER];
        bytes.iter_mut().zip(words.into_iter().flat_map(u32::to_le_bytes)).for_each(|(to, from)| *to = from);
        bytes
    }

    /// Returns the answer to a packet that belongs to no connection (5.10.6.4.1): a reset to the address in the
    /// packet's source fields.
    pub fn reset(&self) -> Header {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            len: 0,
            kind: self.kind,
            op: Op::Reset,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wire_is_as_the_specification_draws_it() {
        let header = Header {
            src_cid: 0x0807_0605_0403_0201,
            dst_cid: 0x100F_0E0D_0C0B_0A09,
            src_port: 0x1413_1211,
            dst_port: 0x1817_1615,
            len: 0x1C1B_1A19,
            kind: 0x1E1D,
            op: Op::Unknown(0x201F),
            flags: 0x2423_2221,
            buf_alloc: 0x2827_2625,
            fwd_cnt: 0x2C2B_2A29,
        };
        let wire: [u8; HEADER] = std::array::from_fn(|i| i as u8 + 1);
        assert_eq!((header.bytes(), Header::parse(&wire)), (wire, header));
        for op in 0..10 {
            let header = Header { op: Op::from_number(op), ..header };
            assert_eq!(Header::parse(&header.bytes()), header);
            assert_eq!(header.op.number(), op);
        }
    }
}

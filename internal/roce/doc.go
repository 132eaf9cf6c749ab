// Package roce encodes and decodes the packets of RoCEv2: the InfiniBand transport headers that UDP carries to port 4791,
// their invariant CRC, and the connection manager's datagrams. It keeps no state, does not allocate, and believes nothing
// of what it decodes.
//
// Sources: InfiniBand Architecture Specification, volume 1, chapter 9 (headers, opcodes) and 12 (connection manager),
// annex A17 (RoCEv2), annex A19 (FLUSH and ATOMIC WRITE).
//
// All fields are big-endian on the wire, but for the invariant CRC.
package roce

// Port is the UDP port that RoCEv2 packets are sent to (A17.3.1.2; assigned by IANA).
const Port = 4791

// Lengths in bytes of what stands around a payload.
const (
	BTHLen  = 12 // the base transport header
	ICRCLen = 4
)

// DefaultPKey is the partition that Ethernet has: all, as a full member.
const DefaultPKey = 0xffff

// MaxHeaderLen is the length of the longest BTH with its extension headers.
const MaxHeaderLen = BTHLen + atomicETHLen

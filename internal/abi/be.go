package abi

import "encoding/binary"

// BE16, BE32 and BE64 are numbers that lie in memory in network byte order on every machine (__be16, __be32, __be64).
// They have types of their own because a number that was not converted must not compile.
type (
	BE16 uint16
	BE32 uint32
	BE64 uint64
)

// ToBE16 converts a number for a big-endian field.
func ToBE16(v uint16) BE16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], v)
	return BE16(binary.NativeEndian.Uint16(b[:]))
}

// FromBE16 returns the number in a big-endian field.
func FromBE16(v BE16) uint16 {
	return uint16(ToBE16(uint16(v))) // the conversion is its own inverse
}

// ToBE32 converts a number for a big-endian field.
func ToBE32(v uint32) BE32 {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], v)
	return BE32(binary.NativeEndian.Uint32(b[:]))
}

// FromBE32 returns the number in a big-endian field.
func FromBE32(v BE32) uint32 { return uint32(ToBE32(uint32(v))) }

// ToBE64 converts a number for a big-endian field.
func ToBE64(v uint64) BE64 {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], v)
	return BE64(binary.NativeEndian.Uint64(b[:]))
}

// FromBE64 returns the number in a big-endian field.
func FromBE64(v BE64) uint64 { return uint64(ToBE64(uint64(v))) }

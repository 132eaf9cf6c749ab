package mr

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// RemoteKeySize is the size of an encoded RemoteKey in bytes.
const RemoteKeySize = 24

// A RemoteKey is what a peer needs to read, write or do atomics on a piece of memory: where, how much, which key. It is a
// value: it is sent to the peer, who puts it into its work requests. It opens nothing by itself after the region or
// window behind it was closed.
//
// Encoded it has 24 bytes, little-endian:
//
//	 0  uint64  Addr
//	 8  uint64  Len, at most 2^63-1, and Addr+Len at most 2^64
//	16  uint32  RKey
//	20  uint32  Access: any of ib.AccessRemoteWrite (2), RemoteRead (4), RemoteAtomic (8); other bits are refused
type RemoteKey struct {
	Addr   uint64
	Len    uint64 // bytes
	RKey   ib.RKey
	Access ib.Access // remote rights only
}

// ErrRemoteKey: bytes are not an encoded RemoteKey.
var ErrRemoteKey = errors.New("mr: malformed remote key")

func (k *RemoteKey) check() error {
	switch {
	case k.Len > math.MaxInt64 || k.Len > 0 && k.Addr > math.MaxUint64-(k.Len-1):
		return fmt.Errorf("%w: %d bytes at address %#x", ErrRemoteKey, k.Len, k.Addr)
	case k.Access&^ib.AccessRemote != 0:
		return fmt.Errorf("%w: access bits %#x", ErrRemoteKey, uint32(k.Access))
	}
	return nil
}

// AppendBinary appends the encoded key to b. It fails if the key could not be decoded again.
func (k RemoteKey) AppendBinary(b []byte) ([]byte, error) {
	if err := k.check(); err != nil {
		return b, err
	}
	b = binary.LittleEndian.AppendUint64(b, k.Addr)
	b = binary.LittleEndian.AppendUint64(b, k.Len)
	b = binary.LittleEndian.AppendUint32(b, uint32(k.RKey))
	return binary.LittleEndian.AppendUint32(b, uint32(k.Access)), nil
}

// MarshalBinary returns the encoded key.
func (k RemoteKey) MarshalBinary() ([]byte, error) {
	return k.AppendBinary(make([]byte, 0, RemoteKeySize))
}

// UnmarshalBinary decodes b, which may come from anybody: exactly RemoteKeySize bytes, or it fails with ErrRemoteKey
// and k is unchanged.
func (k *RemoteKey) UnmarshalBinary(b []byte) error {
	if len(b) != RemoteKeySize {
		return fmt.Errorf("%w: %d bytes, not %d", ErrRemoteKey, len(b), RemoteKeySize)
	}
	d := RemoteKey{
		Addr:   binary.LittleEndian.Uint64(b),
		Len:    binary.LittleEndian.Uint64(b[8:]),
		RKey:   ib.RKey(binary.LittleEndian.Uint32(b[16:])),
		Access: ib.Access(binary.LittleEndian.Uint32(b[20:])),
	}
	if err := d.check(); err != nil {
		return err
	}
	*k = d
	return nil
}

// Slice narrows the key to n bytes at off. It panics, as a slice expression does, if they are not within it.
func (k RemoteKey) Slice(off, n uint64) RemoteKey {
	if n > k.Len || off > k.Len-n {
		panic(rangeError{int(off), int(n), int(k.Len)})
	}
	k.Addr, k.Len = k.Addr+off, n
	return k
}

// Contains reports whether n bytes at off are within the key.
func (k RemoteKey) Contains(off, n uint64) bool { return n <= k.Len && off <= k.Len-n }

func (k RemoteKey) String() string {
	return fmt.Sprintf("%d bytes at %#x, rkey %#x, %s", k.Len, k.Addr, uint32(k.RKey), k.Access)
}

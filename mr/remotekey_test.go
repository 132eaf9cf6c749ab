package mr

import (
	"bytes"
	"encoding"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"testing"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

var (
	_ encoding.BinaryMarshaler   = RemoteKey{}
	_ encoding.BinaryAppender    = RemoteKey{}
	_ encoding.BinaryUnmarshaler = (*RemoteKey)(nil)
)

func TestRemoteKeyGolden(t *testing.T) {
	k := RemoteKey{Addr: 0x1122334455667788, Len: 0x010203, RKey: 0xdeadbeef, Access: ib.AccessRemoteRead | ib.AccessRemoteAtomic}
	b := must(k.MarshalBinary())
	if got, want := hex.EncodeToString(b), "8877665544332211"+"0302010000000000"+"efbeadde"+"0c000000"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if len(b) != RemoteKeySize || cap(b) != RemoteKeySize {
		t.Error(len(b), cap(b))
	}
	var d RemoteKey
	if err := d.UnmarshalBinary(b); err != nil || d != k {
		t.Error(d, err)
	}
	if s := k.String(); s != "66051 bytes at 0x1122334455667788, rkey 0xdeadbeef, remote-read|remote-atomic" {
		t.Error(s)
	}
}

func TestRemoteKeyRefused(t *testing.T) {
	for _, k := range []RemoteKey{
		{Addr: math.MaxUint64, Len: 2},
		{Addr: 2, Len: math.MaxUint64},
		{Len: math.MaxInt64 + 1},
		{Access: ib.AccessLocalWrite},
		{Access: ib.AccessRemoteRead | ib.AccessZeroBased},
		{Access: 1 << 31},
	} {
		if b, err := k.AppendBinary([]byte("x")); !errors.Is(err, ErrRemoteKey) || string(b) != "x" {
			t.Errorf("%+v: %q %v", k, b, err)
		}
	}
	for _, k := range []RemoteKey{{}, {Addr: math.MaxUint64}, {Addr: math.MaxUint64, Len: 1}, {Addr: 1, Len: math.MaxInt64}} {
		b := must(k.MarshalBinary())
		var d RemoteKey
		if err := d.UnmarshalBinary(b); err != nil || d != k {
			t.Errorf("%+v: %+v %v", k, d, err)
		}
	}
	was := RemoteKey{Addr: 1, Len: 2, RKey: 3}
	k := was
	for _, b := range [][]byte{nil, make([]byte, 23), make([]byte, 25), bytes.Repeat([]byte{0xff}, 24)} {
		if err := k.UnmarshalBinary(b); !errors.Is(err, ErrRemoteKey) || k != was {
			t.Errorf("%x: %v, %v", b, err, k)
		}
	}
}

// Whatever a peer sends is refused, or is a key that means the same bytes again and whose ranges do not overflow.
func FuzzRemoteKey(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, RemoteKeySize))
	f.Add(bytes.Repeat([]byte{0xff}, RemoteKeySize))
	f.Add(must(RemoteKey{Addr: 1 << 40, Len: 1 << 20, RKey: 77, Access: ib.AccessRemote}.MarshalBinary()))
	f.Add(must(RemoteKey{Addr: math.MaxUint64, Len: 1}.MarshalBinary()))
	f.Fuzz(func(t *testing.T, b []byte) {
		var k RemoteKey
		if err := k.UnmarshalBinary(b); err != nil {
			if k != (RemoteKey{}) {
				t.Errorf("refused, but changed to %v", k)
			}
			return
		}
		again, err := k.MarshalBinary()
		if err != nil || !bytes.Equal(again, b) {
			t.Errorf("%x became %x, %v", b, again, err)
		}
		if k.Len > 0 && k.Addr+k.Len-1 < k.Addr || int(k.Len) < 0 || k.Access&^ib.AccessRemote != 0 {
			t.Errorf("%v", k)
		}
		if !k.Contains(0, k.Len) || k.Contains(0, k.Len+1) || k.Contains(k.Len+1, 0) || k.Slice(k.Len, 0).Len != 0 {
			t.Errorf("ranges of %v", k)
		}
		_ = k.String()
	})
}

func ExampleRemoteKey() {
	// What a region's Remote method returned is sent to the peer ...
	sent, err := RemoteKey{Addr: 0x7f0000000000, Len: 4096, RKey: 0x1234, Access: ib.AccessRemoteRead}.MarshalBinary()
	if err != nil {
		panic(err)
	}
	// ... who checks it, and puts a part of it into a work request.
	var key RemoteKey
	if err := key.UnmarshalBinary(sent); err != nil {
		panic(err)
	}
	part := key.Slice(1024, 512)
	wr := ib.SendWR{Opcode: ib.OpRDMARead, RemoteAddr: part.Addr, RKey: part.RKey}
	fmt.Println(key)
	fmt.Printf("%s from %#x\n", wr.Opcode, wr.RemoteAddr)
	// Output:
	// 4096 bytes at 0x7f0000000000, rkey 0x1234, remote-read
	// RDMA_READ from 0x7f0000000400
}

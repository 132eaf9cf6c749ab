package uverbs

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/abi"
)

func testBuffer(n int) buffer { return buffer{mem: make([]byte, n), addr: 0x10000} }

// le writes what a little-endian machine has in memory; on others the test only compares with itself.
func littleEndian() bool { return binary.NativeEndian.Uint16([]byte{1, 0}) == 1 }

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A command of every kind of attribute, byte by byte.
func TestMarshalGolden(t *testing.T) {
	if !littleEndian() {
		t.Skip("the golden bytes are little-endian")
	}
	b := testBuffer(512)
	for i := range b.mem {
		b.mem[i] = 0xee
	}
	out := make([]byte, 4)
	var h uint32
	var fd int
	attrs := []Attr{
		In(1, []byte{1, 2, 3, 4}),
		In(2, []byte("more than eight")),
		Out(3, out),
		Const(4, 0x1122334455),
		Handle(5, 7),
		NewHandle(6, &h),
		NewFD(0x1001, &fd),
	}
	n, err := b.marshal(14, 4, 2, attrs)
	if err != nil {
		t.Fatal(err)
	}
	want := unhex(t, `
		8800 0400 0200 0700 0000000000000000 0e000000 00000000
		0100 0400 0100 0000 0102030400000000
		0200 0f00 0100 0000 8800010000000000
		0300 0400 0100 0000 9800010000000000
		0400 0800 0100 0000 5544332211000000
		0500 0000 0100 0000 0700000000000000
		0600 0000 0100 0000 0000000000000000
		0110 0000 0100 0000 0000000000000000`)
	if got := b.mem[:n]; !bytes.Equal(got, want) {
		t.Errorf("got\n%swant\n%s", hex.Dump(got), hex.Dump(want))
	}
	if got := string(b.mem[0x88:][:15]); got != "more than eight" {
		t.Errorf("long data is %q", got)
	}
	if !bytes.Equal(b.mem[0x98:][:4], make([]byte, 4)) {
		t.Error("room for a response is not cleared")
	}

	// The kernel answers.
	copy(b.mem[0x98:], []byte{9, 8, 7, 6})
	binary.NativeEndian.PutUint64(b.mem[hdrLen+attrLen*5+8:], 42)
	binary.NativeEndian.PutUint64(b.mem[hdrLen+attrLen*6+8:], 11)
	if err := b.unmarshal(attrs); err != nil {
		t.Fatal(err)
	}
	if h != 42 || fd != 11 || !bytes.Equal(out, []byte{9, 8, 7, 6}) {
		t.Error(h, fd, out)
	}
	binary.NativeEndian.PutUint64(b.mem[hdrLen+attrLen*2+8:], 0x10000+510)
	if b.unmarshal(attrs) == nil {
		t.Error("an address outside of the buffer was believed")
	}
}

func TestMarshalTooLarge(t *testing.T) {
	b := testBuffer(100)
	for _, attrs := range [][]Attr{
		{In(0, make([]byte, 61))},
		{Out(0, make([]byte, 61))},
		make([]Attr, 5),
	} {
		if _, err := b.marshal(1, 0, 0, attrs); !errors.Is(err, ErrTooLarge) {
			t.Error(err)
		}
	}
	big := testBuffer(1 << 17)
	if _, err := big.marshal(1, 0, 0, []Attr{In(0, make([]byte, 1<<16))}); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
}

// The same command through both doors: INVOKE_WRITE leaves empty parts out.
func TestWriteCmd(t *testing.T) {
	w := WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_REG_MR, In: make([]byte, 40), Out: make([]byte, 12), UHWOut: make([]byte, 8)}
	var ids []uint16
	for _, a := range w.attrs(nil) {
		ids = append(ids, a.id)
	}
	if len(ids) != 4 || ids[0] != abi.UVERBS_ATTR_CORE_IN || ids[1] != abi.UVERBS_ATTR_CORE_OUT ||
		ids[2] != abi.UVERBS_ATTR_WRITE_CMD || ids[3] != abi.UVERBS_ATTR_UHW_OUT {
		t.Errorf("attributes %x", ids)
	}
	if n := len((&WriteCmd{Cmd: 4, In: make([]byte, 4)}).attrs(nil)); n != 2 {
		t.Errorf("%d attributes for a command without a response", n)
	}
	if !littleEndian() {
		t.Skip("the golden bytes are little-endian")
	}
	b := testBuffer(256)
	for i := range 40 {
		w.In[i] = byte(i)
	}
	n, out, outLen, err := b.legacy(&w)
	if err != nil || n != 48 || out != 48 || outLen != 20 {
		t.Fatal(n, out, outLen, err)
	}
	if want := unhex(t, "09000000 0c00 0500 3000010000000000 08090a0b"); !bytes.Equal(b.mem[:20], want) {
		t.Errorf("%x", b.mem[:20])
	}
	ex := WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_FLAG_EXTENDED | 24, In: make([]byte, 64), Out: make([]byte, 40), UHWOut: make([]byte, 32)}
	n, out, outLen, err = b.legacy(&ex)
	if err != nil || n != 88 || out != 88 || outLen != 72 {
		t.Fatal(n, out, outLen, err)
	}
	if want := unhex(t, "18000080 0800 0500 5800010000000000 0000 0400 00000000"); !bytes.Equal(b.mem[:24], want) {
		t.Errorf("%x", b.mem[:24])
	}
	for _, bad := range []WriteCmd{
		{Cmd: 1, In: make([]byte, 4), Out: make([]byte, 4)},
		{Cmd: 1, In: make([]byte, 9)},
		{Cmd: abi.IB_USER_VERBS_CMD_FLAG_EXTENDED, In: make([]byte, 12)},
		{Cmd: 1, In: make([]byte, 400)},
	} {
		if _, _, _, err := b.legacy(&bad); err == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
}

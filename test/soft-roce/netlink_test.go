//go:build linux && (amd64 || arm64)

package main

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Golden bytes, little-endian: what rdma and ip of iproute2 send, but for the order of attributes, which the kernel does not
// mind. The words in hexadecimal are length and type of the header, then each attribute.
func TestMessages(t *testing.T) {
	w := newWiring("veth0", "veth1")
	a, b := w.ends[0], w.ends[1]
	for _, c := range []struct {
		name string
		m    message
		want string
	}{
		{"rdma link add", newLinkMessage(rdmaLink{"rxe0", "rxe", "veth0"}),
			"30000000 0314 0100 01000000 00000000" +
				"0900 0200 7278653000000000" + // rxe0
				"0800 4100 72786500" + // rxe
				"0a00 3300 766574683000 0000"}, // veth0
		{"rdma link delete", delLinkMessage(5), "18000000 0414 0100 01000000 00000000" + "0800 0100 05000000"},
		{"veth", addVeth(a, b), "78000000 1000 0106 01000000 00000000" + strings.Repeat("00", 16) +
			"0a00 0300 766574683000 0000" + "0a00 0100 020000000001 0000" +
			"4000 1200" + "0900 0100 7665746800 000000" + "3000 0200" + "2c00 0100" + strings.Repeat("00", 16) +
			"0a00 0300 766574683100 0000" + "0a00 0100 020000000002 0000"},
		{"link up", setUp(3, 9000), "28000000 1000 0100 01000000 00000000" + "00000000 03000000 01000000 01000000" + "0800 0400 28230000"},
		{"link delete", delNetdev(3), "20000000 1100 0100 01000000 00000000" + "00000000 03000000 00000000 00000000"},
		{"neighbour", setNeighbour(3, b.addr, b.mac), "30000000 1c00 0105 01000000 00000000" +
			"02000000 03000000 8000 00 00" + "0800 0100 0a4d0002" + "0a00 0200 020000000002 0000"},
		{"route", addRoute(3, a.addr, b.addr, 101), "34000000 1800 0106 01000000 00000000" +
			"02200000 6503fd01 00000000" + "0800 0100 0a4d0002" + "0800 0400 03000000" + "0800 0700 0a4d0001"},
		{"rule", w.rules()[0].add(), "3c000000 2000 0106 01000000 00000000" + "02202000 65000001 00000000" +
			"0800 0600 0a000000" + "0700 0300 6c6f00 00" + "0800 0100 0a4d0002" + "0800 0200 0a4d0001"},
		{"local rule", localRule(0).remove(), "24000000 2100 0100 01000000 00000000" + "02000000 ff000001 00000000" + "0800 0600 00000000"},
	} {
		got := hex.EncodeToString(c.m.finish(1))
		want := strings.ReplaceAll(c.want, " ", "")
		if got != want {
			t.Errorf("%s:\n got %s\nwant %s", c.name, got, want)
		}
	}
}

// reply is a message from the kernel.
func reply(typ, flags uint16, seq uint32, body ...byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = append(append(b, 0, 0, 0, 0), body...)
	return append(b, make([]byte, -len(b)&3)...)
}

func errnoBody(errno int32, more ...byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(-errno))
	b = binary.NativeEndian.AppendUint32(b, unix.SizeofNlMsghdr) // the request
	return append(append(b, make([]byte, 12)...), more...)
}

func TestReplies(t *testing.T) {
	text := message(nil).text(unix.NLMSGERR_ATTR_MSG, "no such device type")
	for _, c := range []struct {
		name string
		wire []byte
		done bool
		err  error
		text string
	}{
		{"acknowledged", reply(unix.NLMSG_ERROR, 0, 9, errnoBody(0)...), true, nil, ""},
		{"another's", reply(unix.NLMSG_ERROR, 0, 8, errnoBody(22)...), false, nil, ""},
		{"refused", reply(unix.NLMSG_ERROR, 0, 9, errnoBody(17)...), true, unix.EEXIST, ""},
		{"explained", reply(unix.NLMSG_ERROR, unix.NLM_F_ACK_TLVS, 9, errnoBody(22, text...)...), true, unix.EINVAL, "no such device type"},
		{"explained, capped", reply(unix.NLMSG_ERROR, unix.NLM_F_ACK_TLVS|unix.NLM_F_CAPPED, 9, errnoBody(22, text...)...), true, unix.EINVAL, "no such device type"},
		{"the end of a dump", reply(unix.NLMSG_DONE, 0, 9, 0, 0, 0, 0), true, nil, ""},
	} {
		done, err := replies(c.wire, 9, nil)
		if done != c.done || !errors.Is(err, c.err) || c.text != "" && !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, %v", c.name, done, err)
		}
	}
	if _, err := replies(reply(unix.NLMSG_ERROR, 0, 9, 1, 2), 9, nil); err == nil {
		t.Error("a short acknowledgement is no error")
	}
	long := reply(unix.NLMSG_DONE, 0, 9)
	long[0] = 200
	if _, err := replies(long, 9, nil); err == nil {
		t.Error("a length past the end is no error")
	}
}

func TestDump(t *testing.T) {
	body := func(index uint32, name string) []byte {
		return message(nil).u32(nldevDevIndex, index).text(nldevDevName, name)
	}
	wire := append(reply(nldev(nldevGet), unix.NLM_F_MULTI, 4, body(2, "rxe0")...), reply(nldev(nldevGet), unix.NLM_F_MULTI, 4, body(7, "siw10")...)...)
	wire = append(wire, reply(unix.NLMSG_DONE, unix.NLM_F_MULTI, 4, 0, 0, 0, 0)...)
	names := ""
	done, err := replies(wire, 4, func(b []byte) {
		if err := attributes(b, func(typ uint16, value []byte) {
			if typ == nldevDevName {
				names += string(value)
			}
		}); err != nil {
			t.Error(err)
		}
	})
	if !done || err != nil || names != "rxe0\x00siw10\x00" {
		t.Errorf("%v, %v, %q", done, err, names)
	}
}

func TestAttributesRefused(t *testing.T) {
	for _, b := range [][]byte{{3, 0, 1, 0}, {9, 0, 1, 0, 1, 2, 3, 4}} {
		if err := attributes(b, func(uint16, []byte) {}); err == nil {
			t.Errorf("%v is no error", b)
		}
	}
}

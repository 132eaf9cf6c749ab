package testutil

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func (r *recorder) Name() string              { return "recorder" }
func (r *recorder) Logf(f string, a ...any)   { fmt.Fprintf(&r.log, "log "+f+"\n", a...) }
func (r *recorder) Errorf(f string, a ...any) { fmt.Fprintf(&r.log, "error "+f+"\n", a...) }
func (r *recorder) Cleanup(f func())          { r.TB.Cleanup(f) }

// A Sniffer sees each packet in both directions, and which of them has a wrong invariant CRC.
func TestSniffer(t *testing.T) {
	runtime.LockOSThread() // and never unlocked: the thread ends with the test, and its network with it
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		Skip(t, "network namespaces take root: "+err.Error())
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		Skip(t, fmt.Sprintf("network namespaces take ip(8), of iproute2: %v: %s", err, out))
	}
	r := &recorder{TB: t}
	s, err := sniff(r, "lo")
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw, err := c.(*net.UDPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { // without this, the identification is any
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	})
	if err != nil {
		t.Fatal(err)
	}
	// An IP packet as the system makes it, which nobody takes.
	ip := append([]byte{0x45, 0, 0, 20 + 8 + 12 + 4, 0, 0, 0x40, 0, 64, 17, 0, 0, 127, 0, 0, 1, 127, 0, 0, 1}, make([]byte, 8+12+4)...)
	udp := ip[20:]
	binary.BigEndian.PutUint16(udp, uint16(c.LocalAddr().(*net.UDPAddr).Port))
	binary.BigEndian.PutUint16(udp[2:], 4791)
	binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
	for opcode := range 4 {
		udp[8] = byte(0xc0 + opcode) // nothing of the InfiniBand specification's
		crc := ICRC(ip)
		if opcode == 2 {
			crc++
		}
		binary.LittleEndian.PutUint32(udp[len(udp)-4:], crc)
		if _, err := c.WriteTo(udp[8:], &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 4791}); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
			t.Fatal(err)
		}
	}
	s.Check()
	log := r.log.String()
	for opcode := range 4 {
		for _, out := range []bool{false, true} {
			if n := s.seen[kind{out, byte(0xc0 + opcode)}]; n != 1 {
				t.Errorf("opcode %#x, out %v: seen %d times", 0xc0+opcode, out, n)
			}
		}
	}
	if n := strings.Count(log, "a packet has the ICRC"); n != 2 || strings.Count(log, "error") != 2 {
		t.Errorf("%d packets were found to be wrong:\n%s", n, log)
	}
}

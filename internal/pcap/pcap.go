// Package pcap writes captures that Wireshark and tshark read: pcapng (draft-ietf-opsawg-pcapng), with IP packets that have no
// link layer.
package pcap

import (
	"encoding/binary"
	"io"
	"time"
)

// A Writer writes a capture. It is for one goroutine at a time; each packet is one call of the underlying Write.
type Writer struct {
	w   io.Writer
	buf []byte
}

// Block types, options and the link type (LINKTYPE_RAW: the IP version says which it is).
const (
	blockSection   = 0x0a0d0d0a
	blockInterface = 1
	blockPacket    = 6

	optEnd        = 0
	optComment    = 1
	optUserAppl   = 4
	optTSResol    = 9
	byteOrder     = 0x1a2b3c4d
	linkRaw       = 101
	nanoseconds   = 9 // 10^-9 s
	maxComment    = 1 << 12
	unknownLength = 1<<64 - 1
)

// NewWriter starts a capture; app is the program that makes it.
func NewWriter(w io.Writer, app string) (*Writer, error) {
	p := &Writer{w: w}
	p.begin(blockSection)
	p.u32(byteOrder)
	p.u16(1) // version 1.0
	p.u16(0)
	p.buf = binary.LittleEndian.AppendUint64(p.buf, unknownLength)
	p.option(optUserAppl, app)
	p.option(optEnd, "")
	p.end(0)
	at := len(p.buf)
	p.begin(blockInterface)
	p.u16(linkRaw)
	p.u16(0)
	p.u32(0) // packets are whole
	p.option(optTSResol, string(rune(nanoseconds)))
	p.option(optEnd, "")
	p.end(at)
	_, err := w.Write(p.buf)
	return p, err
}

// Packet adds an IP packet that was seen at t. A comment, shown with it, may be empty; of a long one only the start is kept.
func (p *Writer) Packet(t time.Time, ip []byte, comment string) error {
	p.buf = p.buf[:0]
	p.begin(blockPacket)
	p.u32(0) // the only interface
	ns := uint64(t.UnixNano())
	p.u32(uint32(ns >> 32))
	p.u32(uint32(ns))
	p.u32(uint32(len(ip)))
	p.u32(uint32(len(ip)))
	p.buf = append(p.buf, ip...)
	p.pad()
	if comment != "" {
		p.option(optComment, comment[:min(len(comment), maxComment)])
		p.option(optEnd, "")
	}
	p.end(0)
	_, err := p.w.Write(p.buf)
	return err
}

func (p *Writer) u16(v uint16) { p.buf = binary.LittleEndian.AppendUint16(p.buf, v) }
func (p *Writer) u32(v uint32) { p.buf = binary.LittleEndian.AppendUint32(p.buf, v) }

func (p *Writer) pad() {
	for len(p.buf)&3 != 0 {
		p.buf = append(p.buf, 0)
	}
}

func (p *Writer) option(code uint16, value string) {
	p.u16(code)
	p.u16(uint16(len(value)))
	p.buf = append(p.buf, value...)
	p.pad()
}

func (p *Writer) begin(block uint32) {
	p.u32(block)
	p.u32(0)
}

// end completes the block that begins at byte at of the buffer: its length stands at both ends.
func (p *Writer) end(at int) {
	n := uint32(len(p.buf) - at + 4)
	binary.LittleEndian.PutUint32(p.buf[at+4:], n)
	p.u32(n)
}

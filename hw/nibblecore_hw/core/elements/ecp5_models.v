// Behaviour of the ECP5 cells that nibblecore instantiates, for Verilator. Not for synthesis.

// Two half-cells of a carry chain. With INJECT1 "NO", each adds the carry to its table, and passes the carry on where the
// table is 1; elsewhere the table's lowest four entries, read with A and B, are the carry out.
module CCU2C (
    input  wire CIN,
    input  wire A0, B0, C0, D0,
    input  wire A1, B1, C1, D1,
    output wire S0, S1,
    output wire COUT
);
    parameter [15:0] INIT0 = 16'h0000;
    parameter [15:0] INIT1 = 16'h0000;
    parameter INJECT1_0 = "YES";
    parameter INJECT1_1 = "YES";

    localparam CARRY0 = INJECT1_0 == "NO";
    localparam CARRY1 = INJECT1_1 == "NO";

    wire table0 = INIT0[{D0, C0, B0, A0}];
    wire table1 = INIT1[{D1, C1, B1, A1}];
    wire carry1 = table0 ? CIN : (CARRY0 & INIT0[{2'b00, B0, A0}]);

    assign S0   = table0 ^ (CARRY0 & CIN);
    assign S1   = table1 ^ (CARRY1 & carry1);
    assign COUT = table1 ? carry1 : (CARRY1 & INIT1[{2'b00, B1, A1}]);
endmodule

// A signed multiplier with registers at its inputs and at its output, the only way in which nibblecore uses it. Pins that it
// leaves open, and the upper bits of the product, are left out.
module MULT18X18D (
    input wire
        A17, A16, A15, A14, A13, A12, A11, A10, A9, A8, A7, A6, A5, A4, A3, A2, A1, A0,
    input wire
        B17, B16, B15, B14, B13, B12, B11, B10, B9, B8, B7, B6, B5, B4, B3, B2, B1, B0,
    input wire
        C17, C16, C15, C14, C13, C12, C11, C10, C9, C8, C7, C6, C5, C4, C3, C2, C1, C0,
    input wire SIGNEDA, SIGNEDB, SOURCEA, SOURCEB,
    input wire CLK0, CE0, RST0,
    output wire
        P27, P26, P25, P24, P23, P22, P21, P20, P19, P18, P17, P16, P15, P14, P13, P12, P11, P10, P9, P8, P7, P6, P5,
        P4, P3, P2, P1, P0
);
    parameter REG_INPUTA_CLK = "NONE";
    parameter REG_INPUTA_CE = "CE0";
    parameter REG_INPUTA_RST = "RST0";
    parameter REG_INPUTB_CLK = "NONE";
    parameter REG_INPUTB_CE = "CE0";
    parameter REG_INPUTB_RST = "RST0";
    parameter REG_OUTPUT_CLK = "NONE";
    parameter REG_OUTPUT_CE = "CE0";
    parameter REG_OUTPUT_RST = "RST0";
    parameter GSR = "ENABLED";
    parameter RESETMODE = "SYNC";

    reg signed [17:0] a, b;
    reg [27:0] p;

`ifndef YOSYS  // which does not know $fatal
    initial if (REG_INPUTA_CLK != "CLK0" || REG_INPUTB_CLK != "CLK0" || REG_OUTPUT_CLK != "CLK0")
        $fatal(1, "this model of MULT18X18D has all of its registers");
`endif

    // verilator lint_off WIDTHTRUNC
    always @(posedge CLK0) begin
        if (CE0) begin
            a <= {
                A17, A16, A15, A14, A13, A12, A11, A10, A9, A8, A7, A6, A5, A4, A3, A2, A1, A0};
            b <= {
                B17, B16, B15, B14, B13, B12, B11, B10, B9, B8, B7, B6, B5, B4, B3, B2, B1, B0};
            p <= a * b;
        end
        if (RST0) begin
            a <= 0;
            b <= 0;
            p <= 0;
        end
    end
    // verilator lint_on WIDTHTRUNC

    assign {
        P27, P26, P25, P24, P23, P22, P21, P20, P19, P18, P17, P16, P15, P14, P13, P12, P11, P10, P9, P8, P7, P6, P5,
        P4, P3, P2, P1, P0} = p;

    wire unused = &{
        C17, C16, C15, C14, C13, C12, C11, C10, C9, C8, C7, C6, C5, C4, C3, C2, C1, C0,
        SIGNEDA, SIGNEDB, SOURCEA, SOURCEB};
endmodule
